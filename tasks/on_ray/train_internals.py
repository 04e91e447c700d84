"""Private parts of Ray Train that we need, in one place. `tests/project/test_internals.py` says which one has moved.

Ray Train's backend for PyTorch makes the workers meet at a TCP port that listens on every interface. Ours lets
them meet in a file, and so derives from Ray's private backend. Public replacement: an option of `TorchConfig`
for the store.
"""

from __future__ import annotations

from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

TorchBackend = _TorchBackend
set_torch_distributed_env_vars = _set_torch_distributed_env_vars
