"""SeqKD: the student learns what the teacher said.

The responses of the data are the teacher's answers (tools/generate.py, then tools/process_data.py pseudo); on
them --kd-ratio mixes in the token-level KD of the published scripts, and 0 is SeqKD proper, which never asks
the teacher again.
"""

from __future__ import annotations

from minillm_baselines.kd import KD


class SeqKD(KD):
    """KD whose data comes from the teacher: the method is in the data."""
