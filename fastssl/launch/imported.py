"""Imported by the server that multiprocessing forks the ranks of this host from, and by nobody else: there every rank's
imports are done once, as they take each process seconds. The server does nothing but import, so that no thread of it
and no GPU is lost in a fork. It ends with the process that has started it, and the ranks with the server.
"""

import os

from fastssl.launch.parent import end_with

end_with(os.getppid())  # before what takes seconds: that process may have found a mistake by then

import torch._dynamo  # noqa: E402, F401  # torch's optimisers import it

PID = os.getpid()
ENVIRONMENT = dict(os.environ)
