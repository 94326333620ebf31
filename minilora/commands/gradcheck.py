"""`minilora gradcheck`: compare every operation's gradient, or those of a whole model, with central differences."""

import argparse

from ..options import BASE, settings_of

HELP = "compare every operation's gradient, or a whole model's, with central differences"
TOKENS = 48  # random ones, whose loss is differentiated


def add(parser: argparse.ArgumentParser) -> None:
    """The model, and the seed of the random inputs or directions."""
    parser.add_argument(
        "--base", help=f"check all gradients of this model instead: {BASE}; a folder needs no tokenizer"
    )
    parser.add_argument(
        "--seed",
        default=0,
        help="seed of the random inputs and directions (default: %(default)s)",
        **settings_of(int, {"least": 0}),
    )


def run(arguments: argparse.Namespace) -> None:
    """Print one line for each operation, or for the model, and the largest error."""
    if arguments.base is not None:
        _check_model(arguments.base, arguments.seed)
        return
    from ..engine.examples import check_all

    worst = 0.0
    for report in check_all(arguments.seed):
        print(report)
        worst = max(worst, report.max_relative_error)
    print(f"all gradients agree with central differences in float64; largest relative error {worst:.1e}")


def _check_model(base: str, seed: int) -> None:
    import numpy as np

    from ..models.folder import load_folder
    from ..models.load import load, locate
    from ..nn.gradcheck import gradcheck_model
    from ..nn.parts import Sample

    path = locate(base)
    model = load_folder(path) if path.is_dir() else load(base)[0]  # a random model may have no tokenizer
    length = min(TOKENS, model.config.max_position_embeddings)
    ids = tuple(np.random.default_rng(seed).integers(0, model.config.vocab_size, length).tolist())
    report = gradcheck_model(model, [Sample(ids, ids)], seed=seed)
    count = len(model.trainable_parameters())
    print(
        f"{base}: the gradients of {count} parameters with {report.elements:,} elements agree with central differences "
        f"in float64, each in a random direction; largest relative error {report.max_relative_error:.1e}"
    )
