"""`fomoe train`: before the start, one process of a job, and the loop of its site.

`command` starts the sites, `process` is one of them, `trainer` its loop, `site` what the loop works
on, of parts that know `state` alone. May import all that is below it but other commands.
"""
