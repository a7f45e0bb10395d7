"""Keep the fork server of a study running until its jobs have ended. Only the fork server imports this module.

The fork server reports how the jobs ended, and therefore ignores SIGTERM.
Slurm, systemd and timeout send that signal to all processes at once, on which the jobs write checkpoints.
"""

from __future__ import annotations

import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
