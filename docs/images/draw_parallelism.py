"""Draws the pictures of docs/parallelism.md: `python docs/images/draw_parallelism.py [folder]`.

Needs `pip install 'megagrin[plot]'`.
"""

import sys
from pathlib import Path

import draw_data
import draw_experts
import draw_pipeline
import draw_sequence
import draw_tensor
from drawing import save

PICTURES = {
    "folding": draw_data.folding,
    "data": draw_data.data,
    "tensor": draw_tensor.tensor,
    "vocabulary": draw_tensor.vocabulary,
    "pipeline": draw_pipeline.draw,
    "context": draw_sequence.context,
    "ulysses": draw_sequence.ulysses,
    "expert": draw_experts.expert,
    "expert_tensor": draw_experts.expert_tensor,
}

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, draw in PICTURES.items():
        save(draw(), folder, name)
