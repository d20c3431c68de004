"""`python -m tests.fuzz --seconds 600 --seed 7`: the fuzzer for as long as you like, with everything it found."""

from __future__ import annotations

import argparse
import os
import sys

import pytest

FILES = ("tests/security/test_fuzz.py", "tests/security/test_schema_fuzz.py")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--test", default="test_no_request_makes_a_500", help="or test_requests_made_from_the_schema")
    given = parser.parse_args()
    os.environ |= {"FUZZ_SECONDS": str(given.seconds), "FUZZ_SEED": str(given.seed)}
    sys.exit(pytest.main([*FILES, "-k", given.test, "-s", "--timeout", "0", "--no-header", "-p", "no:cacheprovider"]))
