"""DeepSpeed configuration files for tests."""

from __future__ import annotations

import json


def zero_file(folder, stage: int, bf16: bool = False, offload: bool = False) -> str:
    zero = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # shard even the smallest tensors
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    path = folder / f"zero{stage}{bf16}{offload}.json"
    path.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": bf16}}))
    return str(path)
