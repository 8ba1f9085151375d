"""What the user chose where a dataset can be read in several ways."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modeling.errors import UserError


@dataclass(frozen=True)
class Choices:
    """The flags that say how to read a dataset. None: not chosen."""

    image_column: str | None = None
    label_column: str | None = None
    dataset_config: str | None = None
    train_split: str | None = None
    test_split: str | None = None

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> "Choices":
        """Take the choices out of parsed flags, or out of a checkpoint's header."""
        return cls(
            image_column=flags["image_column"],
            label_column=flags["label_column"],
            dataset_config=flags["dataset_config"],
            train_split=flags["train_split"],
            test_split=flags["test_split"],
        )

    def over(self, others: "Choices") -> "Choices":
        """These choices, and those of `others` where there is none."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return Choices.of(vars(others) | given)

    def differences(self, others: "Choices") -> str:
        """The choices that `others` made differently, as words: "test_split 2024"."""
        theirs = vars(others)
        own = {name: value for name, value in vars(self).items() if value and value != theirs[name]}
        return " ".join(f"{name} {value}" for name, value in own.items())

    @property
    def splits(self) -> dict[str, str]:
        """Which split each chosen name is. UserError: both are one."""
        if self.train_split and self.train_split == self.test_split:
            raise UserError(f"--train-split and --test-split are both {self.train_split}: name two splits")
        return {
            name: split for name, split in ((self.train_split, "train"), (self.test_split, "test")) if name
        }

    def refuse_all_but(self, *usable: str, kind: str) -> None:
        """Raise UserError if a choice is given that means nothing for this kind of dataset."""
        for name, value in vars(self).items():
            if value is not None and name not in usable:
                raise UserError(f"--{name.replace('_', '-')} {value} does not apply to {kind}: leave it out")


NO_CHOICES = Choices()
