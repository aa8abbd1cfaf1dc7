"""`clipmini serve` or `clipmini app` in a process of its own; import as `serving`."""

import contextlib
import subprocess
import sys


@contextlib.contextmanager
def serve_command(folder, verb="serve", *options):
    """Start it on a free port; yield its URL, once it answers, and the process."""
    command = [sys.executable, "-m", "clipmini.cli", verb, str(folder), *options, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            urls = [word for word in line.split() if word.startswith("http://127.0.0.1:")]
            if not urls:
                raise RuntimeError(f"{line}{process.communicate()[1]}")
            yield urls[0], process
        finally:
            process.kill()
