"""A prompt in the terminal, each token in the colour of the expert that ran for it."""

from __future__ import annotations

import colorsys

from rich.color import Color
from rich.style import Style
from rich.text import Text

from factorllm.measure.routing import RoutedPrompt


def coloured_tokens(routed: RoutedPrompt, in_colour: bool) -> Text:
    """The prompt as text: each token in the colour of the expert that the router liked best, or, not `in_colour`, with
    the numbers of all that ran behind it."""
    text, experts = Text(), routed.picks.shape[1]
    for piece, picks, best in zip(routed.pieces, routed.picks, routed.first.tolist(), strict=True):
        if in_colour:
            text.append(piece, expert_style(best, experts))
        else:
            text.append(f"{piece}[{','.join(str(expert) for expert in picks.nonzero().flatten().tolist())}]")
    return text


def legend(routed: RoutedPrompt, in_colour: bool) -> Text:
    """The layer, and each expert in its colour with its share of the tokens."""
    experts = routed.picks.shape[1]
    text = Text(f"layer {routed.layer}, share of tokens:")
    for expert, share in enumerate(routed.picks.float().mean(0).tolist()):
        text.append("  ").append(f"expert {expert}", expert_style(expert, experts) if in_colour else None)
        text.append(f" {share:.0%}")
    return text


def expert_style(expert: int, experts: int) -> Style:
    """Black on a light hue of the expert's own."""
    red, green, blue = (255 * part for part in colorsys.hls_to_rgb(expert / experts, 0.72, 0.75))
    return Style(color="black", bgcolor=Color.from_rgb(red, green, blue).name)
