"""Sites that come and go: who is there, who holds what then, and how a job goes on.

`membership` agrees on who takes part (by the `lighthouse`, which `keeper` runs for the launcher),
`ownership` on who holds which expert, `reform` brings both into force with what `shadows` and
`recovery` have, `company` says when. May import checkpoint, outer, model and what they stand on;
knows a training site by its interface alone (`site`).
"""
