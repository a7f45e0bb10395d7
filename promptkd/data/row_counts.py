"""What became of a data set's rows: counted, said once on the screen, and written into the run's record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from promptkd.data.encoding import Encoded

_TEXTS = {
    "shortened": "shortened (the response is cut at --max-length)",
    "spelled": "spell a special token, which stays text (see --special-tokens)",
    "altered": "have a response that this tokenizer changes behind its prompt",
}


@dataclass
class RowCounts:
    """Numbers of rows.

    Attributes:
        read: Rows that were looked at.
        dropped: Rows left out because their prompt is over --max-prompt-length.
        shortened: Rows whose response is cut at --max-length.
        spelled: Rows of which a text spells a special token, which stays text.
        altered: Rows whose response cannot follow their prompt without a change of the text.
    """

    read: int = 0
    dropped: int = 0
    shortened: int = 0
    spelled: int = 0
    altered: int = 0

    def take(self, made: Encoded, max_prompt_length: int, max_length: int | None) -> bool:
        """Count a row, and return whether it is kept."""
        self.read += 1
        if len(made.prompt) > max_prompt_length:
            self.dropped += 1
            return False
        self.shortened += max_length is not None and len(made.prompt) + len(made.response) > max_length
        self.spelled += made.spelled
        self.altered += made.altered
        return True

    def as_dict(self) -> dict[str, int]:
        """For the run's record."""
        return dataclasses.asdict(self)

    def others(self) -> list[str]:
        """What has to be said besides the dropped rows, one text for each kind."""
        return [f"{count:,} {text}" for name, text in _TEXTS.items() if (count := getattr(self, name))]

    def __str__(self) -> str:
        """What has to be said; empty where every row is used as it is."""
        dropped = [f"{self.dropped:,} dropped (the prompt is over --max-prompt-length)"] if self.dropped else []
        said = [*dropped, *self.others()]
        return f"of {self.read:,} rows {', '.join(said)}" if said else ""
