"""An HTTP server over a living engine, which OpenAI's clients can talk to."""

from importlib.util import find_spec

if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
    raise ImportError(f"stars_kernels.serve needs {', '.join(missing)}: pip install 'stars-kernels[serve]'")

# isort: split
from stars_kernels.serve.app import make_app
from stars_kernels.serve.limits import Limits
from stars_kernels.serve.server import running, serve

__all__ = ["Limits", "make_app", "running", "serve"]
