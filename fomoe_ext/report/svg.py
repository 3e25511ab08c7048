"""Drawings by matplotlib as SVG that a page takes in: its fonts and colours are the page's.

Colours are named by what they are for; the page has a value of each for light and for dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from fomoe_ext.extras import NotInstalled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = ("c1", "c2", "c3", "c4", "c5", "c6")
"""Colours of things side by side."""
COLORS = {
    name: f"#0000{number:02x}" for number, name in enumerate(("ink", "muted", "grid", *SERIES), 1)
}
"""What stands for a colour of the page while matplotlib draws."""

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": COLORS["ink"],
    "axes.labelcolor": COLORS["muted"],
    "axes.edgecolor": COLORS["grid"],
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": COLORS["grid"],
    "ytick.color": COLORS["grid"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": COLORS["ink"],
}


def style() -> Any:
    """A context in which drawings look as a page wants them. Raises NotInstalled."""
    try:
        import matplotlib
    except ImportError as error:
        raise NotInstalled("a report in HTML", "matplotlib", "plot", error) from None
    return matplotlib.rc_context(_STYLE)


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty drawing; sizes in points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    return figure, figure.add_subplot()


def to_svg(figure: Figure, name: str, label: str, titles: Mapping[str, str]) -> str:
    """A drawing as an <svg> element that stands in a page and refers to nothing outside.

    name: of the drawing in its page, by which its ids differ from others'. label: what it shows,
    for who cannot see it. titles: by the `gid` of an artist what is said where the mouse points.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (_SVG + "metadata", _SVG + "style"):
                parent.remove(child)
    for element in root.iter():
        _adapt(element, name, titles)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": label}
    text = ElementTree.tostring(root, encoding="unicode")
    for color, stand_in in COLORS.items():
        text = text.replace(stand_in, f"var(--{color})")
    return text


def _adapt(element: ElementTree.Element, name: str, titles: Mapping[str, str]) -> None:
    """Makes an element one of HTML: no namespaces, ids of its own, its title."""
    element.tag = element.tag.removeprefix(_SVG)
    known = {key.removeprefix(_XLINK): value for key, value in element.attrib.items()}
    title = titles.get(known.get("id", ""))
    if "id" in known:
        known["id"] = f"{name}-{known['id']}"
    if known.get("href", "").startswith("#"):
        known["href"] = f"#{name}-{known['href'][1:]}"
    element.attrib.clear()
    element.attrib |= {
        key: re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", value) for key, value in known.items()
    }
    if title is not None:
        said = ElementTree.Element("title")
        said.text = title
        element.insert(0, said)
