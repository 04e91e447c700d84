"""Check what a command needs from outside before its work starts: variables, folders, servers.

One module per service. A check returns nothing, or raises within 20 seconds a ConfigError of one paragraph, which
`rag doctor` shows too.
"""
