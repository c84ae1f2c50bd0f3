"""Fit a small Phi to the captions of the world of shapes, and write it with its tokenizer.

    python scripts/nova_tiny/train_text_encoder.py --output DIR

A linear map learns to tell from each token's state what the whole caption says: shapes, colours,
sizes, number, relation, background and motion. The last tokens can tell all of it, earlier ones
what they have read. A generator that reads such states need not find out which colour goes with
which shape. No caption has a combination that shapes_world/scenes.py holds out. The folder receives
text_encoder/ and tokenizer/, in the layout of release folders.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from diffnext.cli.parsing import command_parser
from diffnext.models.text_encoders.phi import PhiEncoderModel
from diffnext.pipelines.fresh_folder import tiny_text_encoder, tiny_tokenizer
from shapes_world.captions import write_caption, write_prompt
from shapes_world.evaluation import select_descriptions
from shapes_world import scenes

DROPOUT = 0.1  # of embeddings, so that words are read, not guessed from those before them
# Values that each fact can have; None where a caption leaves it open.
_MENTION_FACTS = ((None, *scenes.SHAPES), (None, *scenes.COLORS), (None, *scenes.SIZES))
FACTS = (
    *_MENTION_FACTS,
    *_MENTION_FACTS,
    tuple(range(1, scenes.MAX_COUNT + 1)),
    (None, *scenes.RELATIONS),
    (None, *scenes.BACKGROUNDS),
    (None, *scenes.MOTIONS),
)
SIZES_OF_FACTS = [len(values) for values in FACTS]


@dataclass(frozen=True)
class Reader:
    """A text encoder, and a linear map that tells facts from its states."""

    tokenizer: PreTrainedTokenizerFast
    encoder: PhiEncoderModel
    readout: nn.Linear

    def read(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Logits of all facts' values side by side, (B, S, values), and where tokens are, (B, S)."""
        tokens = self.tokenizer(captions, padding=True, padding_side="right", return_tensors="pt")
        states = self.encoder(tokens["input_ids"]).last_hidden_state
        return self.readout(states), tokens["attention_mask"].bool()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    if args.output.exists():
        print(f"error: --output {args.output} exists: name a new folder", file=sys.stderr)
        return 1
    torch.manual_seed(args.seed)
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder(args.width)
    reader = Reader(tokenizer, encoder, nn.Linear(args.width, sum(SIZES_OF_FACTS)))
    train(args, reader)
    for held_out in (False, True):
        share = measure(reader, held_out, args.seed)
        print(f"{'held-out' if held_out else 'seen'} prompts read without an error: {share:.3f}")
    partial = args.output.with_name(args.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    encoder.half().save_pretrained(partial / "text_encoder")
    tokenizer.save_pretrained(partial / "tokenizer")
    partial.rename(args.output)
    print(f"Wrote {args.output}")
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("train_text_encoder.py", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must be new")
    parser.add_argument("--width", type=int, default=64, help="of the states (64)")
    parser.add_argument("--steps", type=int, default=2500, help="of training (2500)")
    parser.add_argument("--batch-size", type=int, default=128, help="captions per step (128)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its peak (0.002)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and captions (0)")
    return parser.parse_args(argv)


def train(args: argparse.Namespace, reader: Reader) -> None:
    """Fit encoder and readout, in place."""
    encoder = reader.encoder
    parameters = [*encoder.model.parameters(), *reader.readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1
    )
    rng = np.random.default_rng([args.seed, 0])
    encoder.train()
    encoder.model.embed_dropout.p = DROPOUT
    for _ in (bar := tqdm(range(args.steps), desc="text encoder", mininterval=2)):
        drawn = [draw_caption(rng) for _ in range(args.batch_size)]
        logits, is_token = reader.read([caption for caption, _ in drawn])
        facts = list_facts([description for _, description in drawn])
        loss = fact_errors(logits, facts)[is_token].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    encoder.eval()


def draw_caption(rng: np.random.Generator) -> tuple[str, scenes.Description]:
    """A caption, or a prompt in plain wording, of a picture or a clip, and what it says."""
    if rng.random() < 0.5:
        description = scenes.draw_description(rng, scenes.choose(rng, scenes.CATEGORIES))
    else:
        description = scenes.draw_clip_description(rng, scenes.choose(rng, scenes.CLIP_CATEGORIES))
    if rng.random() < 0.5:
        return write_caption(rng, description), description
    return write_prompt(description), replace(description, background=None)


def list_facts(descriptions: Sequence[scenes.Description]) -> Tensor:
    """Indices of the facts' values, (B, facts)."""
    return torch.tensor(
        [
            [values.index(fact) for values, fact in zip(FACTS, _facts(one), strict=True)]
            for one in descriptions
        ]
    )


def _facts(description: scenes.Description) -> list[str | int | None]:
    mentions = [(one.shape, one.color, one.size) for one in description.mentions]
    first, second = (*mentions, (None, None, None))[:2]
    rest = (description.count, description.relation, description.background, description.motion)
    return [*first, *second, *rest]


def fact_errors(logits: Tensor, facts: Tensor) -> Tensor:
    """Cross-entropy of each token's readout, summed over the facts, (B, S)."""
    columns = facts[:, None].expand(-1, logits.size(1), -1)
    parts = zip(logits.split(SIZES_OF_FACTS, dim=-1), columns.unbind(-1), strict=True)
    errors = [F.cross_entropy(part.mT, column, reduction="none") for part, column in parts]
    return sum(errors[1:], errors[0])


@torch.no_grad()
def measure(reader: Reader, held_out: bool, seed: int, number: int = 200) -> float:
    """Share of prompts whose last token tells every fact."""
    descriptions = [
        description
        for is_clip, categories in ((False, scenes.CATEGORIES), (True, scenes.CLIP_CATEGORIES))
        for category in categories
        for description in select_descriptions(category, held_out, number, seed, is_clip)
    ]
    logits, is_token = reader.read([write_prompt(description) for description in descriptions])
    last = logits[torch.arange(len(descriptions)), is_token.sum(1) - 1]
    told = [part.argmax(-1) for part in last.split(SIZES_OF_FACTS, dim=-1)]
    return (torch.stack(told, dim=1) == list_facts(descriptions)).all(1).float().mean().item()


if __name__ == "__main__":
    sys.exit(main())
