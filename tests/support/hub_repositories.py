"""What a Hub keeps: repositories with branches, commits and files; import as `hub_repositories`."""

import base64
import fnmatch
import hashlib
from dataclasses import dataclass, field

# What goes through LFS, as in the `.gitattributes` that the Hub puts into a new repository.
LFS_PATTERNS = ("*.safetensors", "*.parquet", "*.bin", "*.pt", "*.pth", "*.arrow", "*.npy", "*.zip")
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


class HubError(Exception):
    """An answer that is an error, with the headers by which clients tell one from another."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self):
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"

    @property
    def git_oid(self):
        data = self.pointer.encode() if self.is_lfs else self.content
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.is_lfs else self.git_oid

    def about(self, path):
        """Describe the file as a listing does."""
        facts = {"type": "file", "path": path, "size": len(self.content), "oid": self.git_oid}
        if self.is_lfs:
            facts["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return facts


@dataclass(frozen=True)
class Commit:
    title: str
    files: dict[str, File]
    parent: str | None = None

    @property
    def sha(self):
        parts = [
            self.title,
            str(self.parent),
            *(f"{path} {file.git_oid}" for path, file in sorted(self.files.items())),
        ]
        return hashlib.sha1("\n".join(parts).encode()).hexdigest()


@dataclass
class Repository:
    id: str
    is_private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self):
        self.add_commit("main", Commit("initial commit", {".gitattributes": File(ATTRIBUTES, is_lfs=False)}))

    def add_commit(self, branch, commit):
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha

    def at(self, revision):
        """Find the commit that a branch's name or a hash means."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def file(self, revision, path):
        files = self.at(revision).files
        if path not in files:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        return files[path]

    def history(self, revision):
        """List the commits of a branch, latest first."""
        commit = self.at(revision)
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent)

    def titles(self, revision="main"):
        return [commit.title for commit in self.history(revision)]

    def change(self, branch, operations, uploaded):
        """Apply the lines of a commit request, all or none; gives the new commit.

        Args:
            branch: where to.
            operations: the lines, as JSON values.
            uploaded: contents by SHA-256 of what came through LFS.
        """
        if branch not in self.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header = operations[0]["value"]
        if header.get("parentCommit", self.branches[branch]) != self.branches[branch]:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(self.at(branch).files)
        for operation in operations[1:]:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = File(decode_content(value), is_lfs=False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in uploaded:
                    raise HubError(400, f"{value['path']} was not uploaded")
                files[value["path"]] = File(uploaded[value["oid"]], is_lfs=True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(400, f"unknown operation {operation['key']}")
        commit = Commit(header["summary"], files, self.branches[branch])
        self.add_commit(branch, commit)
        return commit


def decode_content(value):
    return base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()


def goes_through_lfs(path, sample):
    return any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS) or b"\0" in sample
