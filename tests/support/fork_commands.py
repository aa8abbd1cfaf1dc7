"""Run `clipmini` in forks of one process, which has imported all that is slow to import.

Started by test_random_kills.py: reads the arguments of a command, a line of JSON each; forks; writes the process id
and, when that process has ended, its exit code, negative for a signal. What it prints goes to the file `argv[1]`.
"""

import json
import os
import sys

import clipmini.cli
import clipmini.indexing.update
import clipmini.publishing.push
import clipmini.training.lora
import clipmini.training.run
from clipmini.training.offline_towers import resolve_tower


def main():
    for line in sys.stdin:
        arguments = json.loads(line)
        process = os.fork()
        if not process:
            for stream, target in ((0, os.devnull), (1, sys.argv[1]), (2, sys.argv[1])):
                os.dup2(os.open(target, os.O_RDWR | os.O_CREAT | os.O_APPEND), stream)
            if arguments[0] == "resolve":
                sys.stdout.write(f"resolved {resolve_tower(arguments[1])}\n")
                sys.stdout.flush()
                return
            sys.argv = ["clipmini", *arguments]
            clipmini.cli.main()
        sys.stdout.write(f"{process}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
