#!/usr/bin/env python3
"""Prints what came of upstream's tests, as a table, from a report in JUnit's format. Fails if one test did,
or if none ran.

usage: e2e-report.py JUNIT
"""

import re
import sys
import xml.etree.ElementTree as xml


def main():
    passed, failed, skipped = [], [], []
    for case in xml.parse(sys.argv[1]).iter("testcase"):
        name = case.get("name")
        # Other entries are what the suite does before and after.
        if not name.startswith("[It] "):
            if case.get("status") not in ("passed", "skipped"):
                failed.append((name, case))
            continue
        # Without the list of labels, which are in the name, too.
        name = re.sub(r" \[[^]]*\]$", "", name.removeprefix("[It] "))
        if case.get("status") == "passed":
            passed.append((name, case))
        elif case.get("status") in ("skipped", "pending"):
            # What was not chosen has no reason.
            reason = case.find("skipped")
            if reason is not None and reason.get("message", "").startswith("skipped - "):
                skipped.append((name, reason.get("message").removeprefix("skipped - ")))
        else:
            failed.append((name, case))
    print_table(passed, failed, skipped)
    print(f"\n{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped by themselves")
    sys.exit(1 if failed or not passed else 0)


def print_table(passed, failed, skipped):
    print("\n| result | time | test |\n|---|---|---|")
    for result, cases in (("passed", passed), ("FAILED", failed)):
        for name, case in sorted(cases, key=lambda pair: pair[0]):
            print(f"| {result} | {float(case.get('time', 0)):.0f} s | {cell(name)} |")
    for name, reason in sorted(skipped):
        print(f"| skipped | | {cell(name)}: {cell(reason)} |")


def cell(text):
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
