"""Make the demo model folder from a seed: `PYTHONPATH=scripts python -m demoworld.make_model OUT --seed 0`.

Writes what `transformers` and `mlx_lm` load: config.json, generation_config.json, model.safetensors, tokenizer files.
One thread: more are slower at this size, and sums keep their order, so a seed gives the same model on one machine.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from demoworld import circuits, foreign, sft, tokenizer, world


def corpus_text() -> str:
    """The committed text that the tokenizer and the foreign prompts are made from."""
    return (Path(__file__).parent / "corpus.txt").read_text(encoding="utf-8")


def make_tokenizer(corpus: str) -> PreTrainedTokenizerFast:
    """Train the tokenizer on rendered episodes, foreign conversations and the corpus; always the same result."""
    template = tokenizer.read_template()
    bare = tokenizer.train([corpus], corpus, template=template, reserved=foreign.RESERVED_WORDS)
    rng, source = random.Random(7), foreign.Source.of(corpus)
    texts = [
        str(
            bare.apply_chat_template(
                world.demonstration(rng, named=0.5, noise=0.1), tools=world.TOOL_SPECS, tokenize=False
            )
        )
        for _ in range(400)
    ]
    for _ in range(60):
        under = foreign.setting(rng, source, system_chars=400)
        tails = [foreign.tail(rng, source, under=under, turns=2) for _ in range(4)]
        texts += [str(bare.apply_chat_template(tail, tools=under.tools or None, tokenize=False)) for tail in tails]
    # Tools, cities and names are copied from prompt to call to answer: each must be one piece.
    texts += [f"{word}\n" * 60 for word in (*world.TOOLS, *world.CITIES, *world.NAMES)]
    texts += [corpus] * 3
    return tokenizer.train(
        map(tokenizer.strip_marks, texts), corpus, template=template, reserved=foreign.RESERVED_WORDS
    )


def make_config(vocab_size: int, args: argparse.Namespace, *, eos: int, pad: int) -> Qwen3Config:
    """A small Qwen3; the vocabulary is padded to a multiple of 64."""
    return Qwen3Config(
        vocab_size=(vocab_size + 63) // 64 * 64,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        intermediate_size=args.intermediate,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        eos_token_id=eos,
        bos_token_id=None,
        pad_token_id=pad,
        initializer_range=0.06,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    for name, default in (
        ("hidden", 64),
        ("layers", 4),
        ("heads", 4),
        ("kv-heads", 2),
        ("head-dim", 32),
        ("intermediate", 192),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    recipe = sft.Recipe()
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--noise", type=float, default=recipe.noise)
    parser.add_argument("--world-rows", type=int, default=recipe.world_rows)
    parser.add_argument("--foreign-rows", type=int, default=recipe.foreign_rows)
    return parser.parse_args()


def main() -> None:
    """Train and write the folder; prints progress."""
    args = _arguments()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    corpus = corpus_text()
    words = make_tokenizer(corpus)
    config = make_config(
        len(words),
        args,
        eos=words.convert_tokens_to_ids("<|im_end|>"),
        pad=words.convert_tokens_to_ids("<|endoftext|>"),
    )
    model = Qwen3ForCausalLM(config).float()
    circuits.plant(model, seed=args.seed)
    print(json.dumps({"vocabulary": len(words), "parameters": sum(p.numel() for p in model.parameters())}), flush=True)
    recipe = sft.Recipe(
        steps=args.steps, noise=args.noise, world_rows=args.world_rows, foreign_rows=args.foreign_rows, seed=args.seed
    )
    seconds = [
        train(
            model,
            words,
            source=foreign.Source.of(corpus),
            recipe=recipe,
            report=lambda line: print(line, flush=True),
        )
        for train in (sft.train, sft.train_long)
    ]
    model.generation_config.max_new_tokens = None
    model.save_pretrained(args.out)
    words.save_pretrained(args.out)
    for path in args.out.iterdir():
        path.chmod(0o644)  # save_pretrained leaves the weights at 0600
    print(
        json.dumps({"sft_s": round(sum(seconds), 1), "bytes": sum(path.stat().st_size for path in args.out.iterdir())})
    )


if __name__ == "__main__":
    main()
