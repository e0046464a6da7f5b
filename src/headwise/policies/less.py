"""Less: a policy and trained kernels -> the same policy, with what it evicts remembered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from torch import nn

from headwise.less.checkpoint import check_kernels, load_kernels, shipped_kernels
from headwise.less.features import LayerFeatures, LessKernels
from headwise.policies.wrapper import Wrapper


@dataclass(frozen=True)
class Less(Wrapper):
    """Keeps what another policy keeps, and folds what that evicts into a small state, where it can still be queried.

    "Get More with LESS" (Dong et al., ICML 2024, arXiv 2402.09398). Each KV head has a state of constant size, in fp32;
    a token is folded into it when its row goes, at the end of the prompt or later, and never comes back.

    Args:
        policy: what decides which rows stay.
        kernels: trained for the model: what `load_kernels` gives, or the folder they are in; None for those that
            come with headwise, which are for its default model.

    Raises:
        ConfigurationError: when the policy is none, or has a memory already.
    """

    name: ClassVar[str] = "less"

    kernels: LessKernels | str | Path | None = None

    def __str__(self) -> str:
        """How Python would build it, without what is left at its default."""
        kernels = "" if self.kernels is None else f", kernels={self.kernels!r}"
        return f"Less({self.policy}{kernels})"

    @property
    def title(self) -> str:
        """The policy's, with LESS."""
        return f"{self.policy.title} with LESS"

    def read(self) -> Less:
        """With its kernels read.

        Raises:
            InputError: when there are none in the folder.
        """
        if isinstance(self.kernels, LessKernels):
            return self
        return replace(self, kernels=load_kernels(shipped_kernels() if self.kernels is None else Path(self.kernels)))

    def load(self, model: nn.Module) -> Less:
        """With its kernels read, for that model.

        Raises:
            InputError: when there are none in the folder.
            MismatchError: when they were trained for another model.
        """
        loaded = self.read()
        assert isinstance(loaded.kernels, LessKernels)
        check_kernels(loaded.kernels, model)
        return loaded

    @property
    def layers(self) -> Mapping[int, LayerFeatures]:
        """The kernels by layer, once they are loaded."""
        return self.kernels.layers if isinstance(self.kernels, LessKernels) else {}

    @property
    def trained(self) -> bool:
        """Whether the kernels, once loaded, have seen what a policy of this kind evicts."""
        known = self.kernels.about.get("policies", ()) if isinstance(self.kernels, LessKernels) else ()
        return any(spec.partition(":")[0] == self.chooser.name for spec in known)
