import platform
import subprocess
import sys

from clipmini.training.run import keep_freed_memory

# How often the system has to clear a page for a block that is allocated, touched and freed twenty times.
COUNT_PAGE_FAULTS = """
import resource, sys, torch
from clipmini.training.run import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
for _ in range(10):  # until the heap has grown to its size
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again():
    def page_faults(*arguments):
        command = [sys.executable, "-c", COUNT_PAGE_FAULTS, *arguments]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    if platform.libc_ver()[0] == "glibc" and sys.platform == "linux":
        assert page_faults("keep") * 10 < page_faults()


def test_it_does_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
