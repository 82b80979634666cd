"""Runs the Autobahn cases against ws://127.0.0.1:PORT and prints one JSON line for each case that did not pass."""

import asyncio
import json
import sys

from kosoku import FailureError, run_fuzzingclient

# 12 and 13 are permessage-deflate, which wsproxy does not negotiate.
EXCLUDED = ["12.*", "13.*"]


async def main() -> None:
    try:
        passed = len(await run_fuzzingclient(f"127.0.0.1:{sys.argv[1]}", None, EXCLUDED))
        failed = []
    except FailureError as failure:
        passed = None
        failed = failure.results
    for case in failed:
        print(json.dumps({
            "case": case.case_id,
            "behavior": case.behavior.value,
            "close": case.behavior_close.value,
            "code": case.remote_close_code,
            "passed": case.passed,
            "description": case.description,
        }))
    print(json.dumps({"cases": passed}))


asyncio.run(main())
