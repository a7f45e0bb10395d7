"""SeqKD: cross-entropy on the teacher's responses.

`tools/generate.py` and then `tools/process_data.py pseudo` make the data. --kd-ratio mixes in KD on the same tokens, as
in the published scripts. With --kd-ratio 0, training does not use the teacher.
"""

from __future__ import annotations

from minillm_baselines.kd import KD


class SeqKD(KD):
    """KD whose data comes from the teacher: the method is in the data."""
