"""Sites that come and go: who is there, who holds what then, and how a job goes on.

`membership` agrees on who takes part, `ownership` on who holds which expert, `reform` brings both
into force, `inject` makes faults for tests.
"""
