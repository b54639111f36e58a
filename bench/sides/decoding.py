"""One prefill or a few decoded tokens a turn, the same for every side of the int8 bench; needs torch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import turn


def take_turns(model: Any, given: dict[str, Any], facts: Callable[[], dict[str, Any]] = dict) -> None:
    """Warms up in one turn, then prefill and decoding in turn until no more are wanted."""
    ids_BT = torch.from_numpy(np.load(given["windows"]))

    def prefill() -> None:
        model(input_ids=ids_BT, use_cache=False, logits_to_keep=1)

    def decode() -> None:
        made = model(input_ids=ids_BT[:, :1], use_cache=True)
        for _ in range(given["tokens"]):
            token_B1 = made.logits[:, -1:].argmax(-1)
            made = model(input_ids=token_B1, past_key_values=made.past_key_values, use_cache=True)

    with torch.no_grad():
        turn.wait()
        prefill()
        decode()
        turn.tell(**facts())
        while True:
            for piece in (prefill, decode):
                turn.wait()
                piece()
                turn.tell(**facts())
