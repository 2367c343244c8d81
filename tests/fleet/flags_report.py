"""Runs in the Python of a build of vLLM: lets its own parser of `vllm serve` read command lines, prints what it says.

argv: a JSON list of lists of words, as they follow `vllm serve`; stdout: `REPORT ` and a JSON list, null or the error.
"""

import json
import sys


def main() -> None:
    """Parse each."""
    from vllm.entrypoints.cli.serve import make_arg_parser, validate_parsed_serve_args  # noqa: PLC0415
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser = make_arg_parser(FlexibleArgumentParser())
    parser.error = refuse
    said = []
    for words in json.loads(sys.argv[1]):
        try:
            validate_parsed_serve_args(parser.parse_args(words))
            said.append(None)
        except ValueError as error:
            said.append(str(error))
    print("REPORT", json.dumps(said))  # noqa: T201


if __name__ == "__main__":
    main()
