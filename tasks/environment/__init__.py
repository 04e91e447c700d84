"""What a command needs from outside is looked at before its work begins: variables, folders, servers.

One module a service; each check returns nothing, or raises a ConfigError of one paragraph within 20 seconds. `rag doctor`
shows the same words.
"""
