"""The words for a link: read, told, refused."""

from __future__ import annotations

import pytest

from fomoe_ext.config.links import describe, parse_link
from fomoe_ext.placement.wire import Link


@pytest.mark.parametrize(
    "text, link, words",
    [
        ("200mbit,50ms", Link(2e8, 0.05), "200 Mbit/s, 50 ms"),
        ("1gbit", Link(1e9, 0.0), "1 Gbit/s"),
        (" 2.5 Gbit , 300 US ", Link(2.5e9, 3e-4), "2.5 Gbit/s, 300 us"),
        ("56kbit,1.5s", Link(56e3, 1.5), "56 kbit/s, 1.5 s"),
        ("999bit,0ms", Link(999, 0.0), "999 bit/s"),
        ("1e3mbit,.5us", Link(1e9, 5e-7), "1 Gbit/s, 0.5 us"),
    ],
)
def test_links_are_read_and_told(text, link, words):
    assert parse_link(text) == pytest.approx(link)
    assert describe(link) == words


@pytest.mark.parametrize(
    "text",
    [
        *("", ",", "200", "mbit", "200mb", "200mbit,", "200mbit,50", "200mbit,50ms,1ms"),
        *("50ms", "50ms,200mbit", "-1mbit", "0mbit", "0.1bit", "nanmbit", "infgbit", "1e999gbit"),
        *("1..2mbit", "200mbit,-1ms", "200mbit;counted", "200mbit,1e999s"),
    ],
)
def test_what_is_no_link_is_refused(text):
    with pytest.raises(
        ValueError, match=r"link must be a bandwidth .* such as 200mbit,50ms"
    ) as error:
        parse_link(text)
    assert repr(text) in str(error.value)
