"""Knowledge distillation as Minitron uses it (Muralidharan et al., 2024): a student learns a teacher's predictions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from overhaul.errors import UserError
from overhaul.method import Fraction, NonNegative, Positive, Rate, Training
from overhaul.progress import say

if TYPE_CHECKING:
    from torch import nn

    from overhaul.data import Data
    from overhaul.teacher_cache import TeacherCache
    from overhaul.train import Plan

NEARLY_KEPT = 0.8
"""From this share of the teacher's depth on, predictions alone are enough; below, hidden states help."""

_ALONE = ("auto", "none")


def vocabulary_difference(student: Mapping[str, int], teacher: Mapping[str, int]) -> str:
    """Where two vocabularies (word -> number) differ, as a clause; empty when they are one."""
    if student == teacher:
        return ""
    if len(student) != len(teacher):
        return f"the student's tokenizer has {len(student):,} words, the teacher's {len(teacher):,}"
    own, theirs = ({number: word for word, number in words.items()} for words in (student, teacher))
    number = min(number for number in own.keys() | theirs.keys() if own.get(number) != theirs.get(number))
    return f"word {number} is {own.get(number)!r} for the student and {theirs.get(number)!r} for the teacher"


class KnowledgeDistillation(Training):
    """Learn what a larger model predicts, word by word, instead of which word came next.

    The loss is the divergence between the two models' distributions over the next word; no logits are ever held as a
    whole. With --states the student's hidden states are drawn to the teacher's as well, through one learned map, and
    both losses count alike. With --top-k the teacher's likeliest words are computed once and kept on disk.
    """

    paper: ClassVar[str] = (
        "Muralidharan, Sreenivas, Joshi et al.: Compact Language Models via Pruning and Knowledge Distillation, 2024, "
        "arXiv:2407.14679"
    )

    teacher: str = Field(min_length=1, description="Model to learn from, with the student's vocabulary.")
    temperature: Rate = Field(1.0, description="Divides the logits of both models.")
    direction: Literal["forward", "reverse"] = Field(
        "forward", description="forward: KL(teacher || student); reverse: KL(student || teacher)."
    )
    ce_weight: NonNegative = Field(0.0, description="Weight of the cross-entropy with the text itself.")
    states: tuple[str, ...] = Field(
        ("auto",),
        description="Hidden states to learn too: auto, none, or any of embedding, layers, and numbers of blocks.",
    )
    top_k: Positive | None = Field(
        None, description="Keep the teacher's so many likeliest words on disk, and learn from these."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="Decay after the warm-up.")
    floor: Fraction = Field(0.1, description="Share of the peak rate at which the decay ends.")

    @field_validator("states")
    @classmethod
    def _known_states(cls, states: tuple[str, ...]) -> tuple[str, ...]:
        odd = [word for word in states if word not in (*_ALONE, "embedding", "layers") and not word.isdecimal()]
        if odd or not states:
            raise ValueError("use auto, none, or any of embedding, layers, and numbers of the student's blocks")
        if len(states) > 1 and any(word in _ALONE for word in states):
            raise ValueError("auto and none stand alone")
        return tuple(dict.fromkeys(states))

    @model_validator(mode="after")
    def _words_have_no_states(self) -> KnowledgeDistillation:
        if self.top_k and self.states[0] not in _ALONE:
            raise ValueError("top_k keeps words of the teacher, no hidden states: use states none, or leave top_k out")
        return self

    def others(self) -> tuple[str, ...]:
        """The teacher."""
        return (self.teacher,)

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Compares vocabularies, and looks for the layers and words that were asked for."""
        from overhaul import artifact
        from overhaul.generation import longest_of
        from overhaul.interop import hf

        assert data is not None
        config = artifact.read_config(self.teacher)
        theirs = artifact.read_tokenizer(self.teacher)
        if difference := vocabulary_difference(data.tokenizer.get_vocab(), theirs.get_vocab()):
            raise UserError(
                f"{self.teacher} cannot teach this model: {difference}",
                allowed="two models with one vocabulary, whose predictions can be compared word by word",
                hint="a teacher of the same family, such as the model that the student was cut from",
            )
        if self.top_k and self.top_k > (most := min(hf.num_words(config), hf.num_words(model.config))):
            raise UserError(f"--top-k {self.top_k} is more than the vocabulary has", allowed=f"up to {most}")
        if self.seq_len > (longest := longest_of(config)):
            raise UserError(f"--seq-len {self.seq_len} is more than {self.teacher} reads", allowed=f"up to {longest}")
        if self.pairs(hf.depth(model.config), hf.depth(config)):
            hf.refuse_two(config, f"--states {' '.join(self.states)}: {self.teacher}")

    def pairs(self, depth: int, teacher_depth: int) -> tuple[tuple[int, int], ...]:
        """The hidden states that are compared: places in the student and in the teacher, 0 being the embedding.

        Raises:
            UserError: the student has no such block.
        """
        from overhaul.distillation import pairs_by_depth, partner

        if self.states == ("none",) or (
            self.states == ("auto",) and (self.top_k or not self._is_deep(depth, teacher_depth))
        ):
            return ()
        if self.states == ("auto",):
            return pairs_by_depth(depth, teacher_depth)
        places = {int(word) for word in self.states if word.isdecimal()}
        if beyond := sorted(place for place in places if not 1 <= place < depth):
            raise UserError(
                f"--states {beyond[0]}: the student has {depth} blocks, and what comes from the last is its prediction",
                allowed=f"1 to {depth - 1}, embedding, layers" if depth > 1 else "embedding",
            )
        if "embedding" in self.states:
            places.add(0)
        if "layers" in self.states:
            places |= {place for place, _ in pairs_by_depth(depth, teacher_depth) if place}
        return tuple((place, partner(place, depth, teacher_depth)) for place in sorted(places))

    @staticmethod
    def _is_deep(depth: int, teacher_depth: int) -> bool:
        """Whether so much of the teacher's depth is missing that its hidden states are of help."""
        return depth < NEARLY_KEPT * teacher_depth

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """All parameters on the divergence from the teacher; masks of a pruned student are enforced."""
        from overhaul.distillation import distillation_plan
        from overhaul.interop import hf

        how: dict[str, Any] = {
            "temperature": self.temperature,
            "direction": self.direction,
            "ce_weight": self.ce_weight,
            "floor": self.floor,
        }
        if self.top_k:
            if self.states == ("auto",):
                say("states: none, for the teacher's words are kept without its hidden states")
            return distillation_plan(model, self._cache(model), data, self, **how)
        teacher = self._load(model)
        _say_teacher(model, teacher, self.teacher)
        depths = hf.depth(model.config), hf.depth(teacher.config)
        pairs = self.pairs(*depths)
        if self.states == ("auto",):
            why = f"the student has {depths[0]} of the teacher's {depths[1]} blocks"
            say(f"states: {why}, so {'hidden states are learnt too' if pairs else 'predictions are enough'}")
        return distillation_plan(model, teacher, data, self, pairs=pairs, **how)

    def _load(self, student: nn.Module) -> nn.Module:
        """The teacher on the student's device, in fp32 where the student is."""
        import torch

        from overhaul import artifact

        own = next(student.parameters())
        dtype = torch.float32 if own.dtype == torch.float32 else None
        return artifact.load(self.teacher, dtype=dtype, device=own.device).model.requires_grad_(False)

    def _cache(self, student: nn.Module) -> TeacherCache:
        """The teacher's likeliest words on disk; the teacher itself is loaded only for those that are not there."""
        from overhaul import artifact
        from overhaul.interop import hf
        from overhaul.sharding import num_processes
        from overhaul.teacher_cache import TeacherCache

        assert self.top_k
        path, base = artifact.directories(self.teacher)
        known = [artifact.weights_sha256(directory) for directory in dict.fromkeys((path, base))]
        known.append((base / "config.json").read_text())
        own = next(student.parameters())
        cache = TeacherCache(
            lambda: self._load(student),
            teacher_sha256=hashlib.sha256("\n".join(known).encode()).hexdigest(),
            dtype=own.dtype,
            top_k=self.top_k,
            num_words=min(hf.num_words(artifact.read_config(self.teacher)), hf.num_words(student.config)),
            temperature=self.temperature,
        )
        num_windows = self.steps * self.batch_size * self.accumulate * num_processes()
        tokens = num_windows * (self.seq_len - 1)
        cache.refuse_full_disk(tokens)
        say(
            f"the teacher's {self.top_k} likeliest words of {tokens:,} tokens: "
            f"{cache.num_bytes(tokens) / 1e6:.0f} MB in {cache.directory}, which stay for the next student"
        )
        return cache


def _say_teacher(student: nn.Module, teacher: nn.Module, name: str) -> None:
    import torch

    tensors, own = teacher.state_dict(), student.state_dict()
    size = sum(parameter.nbytes for parameter in (*teacher.parameters(), *teacher.buffers()))
    say(f"teacher {name}: {size / 1e6:.0f} MB beside the student, without gradients")
    if own.keys() == tensors.keys() and all(torch.equal(own[key], tensors[key]) for key in own):
        say("note: teacher and student are the same model: the loss is zero, and nothing will change")
