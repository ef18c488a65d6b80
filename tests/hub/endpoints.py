"""The endpoints of the fake Hub that huggingface_hub calls when it pushes and pulls a model."""

import base64
import hashlib
import json
import re

from .card import card_problems
from .protocol import BROKEN, CUT, GARBLED, READER, WRITER, Connection, Refusal
from .repository import Commit, Repository, git_oid


__all__ = ["Handler"]

REGULAR_BYTES = 4096  # larger files go as large files, whatever they hold


class Handler(Connection):
    """Request handler with one method per endpoint, named after its stage in `ROUTES`; each answers once."""

    def _serve(self) -> None:
        payload = json.loads(self.body) if self.stage == "create" else {}
        self.id = self.found.get("id") or (payload and f"{payload['organization'] or 'me'}/{payload['name']}") or None
        self.hub.requests.append((self.stage, self.id, self.headers.get("User-Agent", "")))
        stage, status, *path = self.hub.failures.get(self.id, (None, None))
        fails = stage == self.stage and self.found.get("path") in (path or [self.found.get("path")])
        if fails and status == BROKEN:
            self.close_connection = True
        elif fails and status not in (CUT, GARBLED):
            raise Refusal(status, f"{self.stage} fails on demand")
        else:
            self.damage = status if fails else None
            getattr(self, f"_{self.stage}")()

    def _create(self) -> None:
        self._require(WRITER)
        payload = json.loads(self.body)
        self.hub.payloads.append(payload)
        url = {"url": f"{self.hub.url}/{self.id}"}
        if self.id in self.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo", **url})
        if not self.id.startswith("me/"):
            raise Refusal(403, f"You don't have the rights to create a model under {self.id.split('/')[0]}")
        visibility = payload.get("visibility", "private" if payload.get("private") else "public")
        self.hub.repositories[self.id] = Repository(visibility == "private")
        self._answer(200, url)

    def _validate(self) -> None:
        problems = card_problems(json.loads(self.body)["content"])
        self._answer(400 if problems else 200, {"errors": [{"message": p} for p in problems], "warnings": []})

    def _auth(self) -> None:
        self._repository()
        self._require(WRITER)
        if not self.id.startswith("me/"):
            raise Refusal(403, "You don't have write access to this repository")
        self._answer(200, {})

    def _info(self) -> None:
        commit = self._commit_found()
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        self._answer(200, {"id": self.id, "sha": commit.oid, "private": self.repository.private, "siblings": siblings})

    def _tree(self) -> None:
        commit, folder = self._commit_found(), self.found["path"]
        names = [n for n in sorted(commit.files) if folder is None or n.startswith(f"{folder}/")]
        if folder and not names:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        files = [(name, commit.files[name]) for name in names]
        self._answer(200, [{"type": "file", "path": n, "size": len(c), "oid": git_oid(c)} for n, c in files])

    def _preupload(self) -> None:
        self._auth_of_commit()
        commit, answers = self._commit_found(), []
        for file in json.loads(self.body)["files"]:
            large = file["size"] > REGULAR_BYTES
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            content = commit.files.get(file["path"])
            if content is not None:
                answer["oid"] = hashlib.sha256(content).hexdigest() if large else git_oid(content)
            answers.append(answer)
        self._answer(200, {"files": answers})

    def _batch(self) -> None:
        self._auth_of_commit()
        objects = []
        for item in json.loads(self.body)["objects"]:
            base = f"{self.hub.url}/lfs/{self.id}"
            actions = {"upload": {"href": f"{base}/{item['oid']}"}, "verify": {"href": f"{base}/verify"}}
            stored = item["oid"] in self.repository.large
            objects.append({**item} if stored else {**item, "actions": actions})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self) -> None:
        if hashlib.sha256(self.body).hexdigest() != self.found["oid"]:
            raise Refusal(400, "the content does not have that hash")
        self._repository().large[self.found["oid"]] = self.body
        self._answer(200, {})

    def _verify(self) -> None:
        item = json.loads(self.body)
        if len(self._repository().large.get(item["oid"], b"")) != item["size"]:
            raise Refusal(404, "that file was not uploaded")
        self._answer(200, {})

    def _commit(self) -> None:
        self._auth_of_commit()
        head, revision = self._commit_found(), self.found["revision"]
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        parent = header["value"].get("parentCommit")
        if parent not in (None, head.oid):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.repository.large[value["oid"]]
            elif value["path"] not in files:
                raise Refusal(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            else:
                del files[value["path"]]
        commit = Commit(header["value"]["summary"], files, operations, head.oid, parent)
        answer = {"commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{self.id}/commit/{commit.oid}"}
        if self.query.get("create_pr") == ["1"]:
            number = len(self.repository.branches)
            self.repository.branches[f"refs/pr/{number}"] = [head, commit]
            answer |= {"pullRequestUrl": f"{self.hub.url}/{self.id}/discussions/{number}"}
        else:
            self.repository.branches[revision].append(commit)
        self._answer(200, answer)

    def _resolve(self) -> None:
        commit = self._commit_found()
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        content = commit.files.get(self.found["path"])
        if content is None:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **headers})
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._answer(200, content, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(206, content[first : last + 1], headers)

    # What they share.

    def _require(self, *tokens: str) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given not in (WRITER, READER):
            raise Refusal(401, "Invalid username or password.")
        if given not in tokens:
            raise Refusal(403, "This token has no write permission")

    def _auth_of_commit(self) -> None:
        self._repository()
        if self.query.get("create_pr") == ["1"] or self.stage == "batch":
            return self._require(WRITER, READER)
        self._require(WRITER)

    def _repository(self) -> Repository:
        self.repository = self.hub.repositories.get(self.id)
        if self.repository is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if self.repository.private:
            self._require(WRITER, READER) if self.stage not in ("put", "verify") else None
        return self.repository

    def _commit_found(self) -> Commit:
        commit = self._repository().find(self.found.get("revision") or "main")
        if commit is None:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        return commit
