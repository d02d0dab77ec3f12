"""Let a trained model answer one prompt, lines from the terminal, or a few built-in prompts.

python scripts/test_inference.py checkpoint.pt --prompt "What is the capital of France?"
python scripts/test_inference.py outputs/anemll_tiny_a_v2 --model-id tiny --interactive
"""

from pathlib import Path

import _anemll


def main() -> None:
    parser = _anemll.parser(__doc__, writes=False)
    parser.add_argument("checkpoint", type=Path, help="a run, a checkpoint folder or a .pt file")
    parser.add_argument("--version", choices=["v1", "v2"], help="check that the checkpoint has this version")
    _anemll.add_sizes(parser)
    parser.add_argument("--prompt")
    parser.add_argument("--interactive", "-i", action="store_true")
    parser.add_argument("--max-tokens", type=_anemll.at_least(1), default=512)
    parser.add_argument("--temperature", type=float, default=0.6, help="0 always chooses the likeliest token")
    parser.add_argument("--repetition-penalty", type=float, default=1.1)
    parser.add_argument("--no-thinking", action="store_true", help="turn off thinking, if the template has it")
    args = parser.parse_args()
    settings = {"checkpoint": args.checkpoint, "model_id": args.model_id, "sizes": _anemll.sizes(args)}
    settings |= {"version": args.version, "prompt": args.prompt, "interactive": args.interactive}
    settings |= {"max_tokens": args.max_tokens, "temperature": args.temperature, "thinking": not args.no_thinking}
    _anemll.tool("inference", **settings, repetition_penalty=args.repetition_penalty)


if __name__ == "__main__":
    main()
