"""The private part of Prefect that we need. `tests/project/test_internals.py` says when an upgrade has moved it.

`SERVER_APPLICATION` is the factory of Prefect's server, as uvicorn takes it. A command starts its temporary server with
it while its other imports are still running. Public replacement: Prefect's own temporary server, which starts only at
the first request and cannot be replaced when it is lost; or `prefect server start`, which takes twice as long.
"""

SERVER_APPLICATION = "prefect.server.api.server:create_app"
