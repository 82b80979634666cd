"""What was said, in SQLite: the truth, of which the log in Redis is a cache. Another database is another Store."""

import json
import sqlite3
import time
import uuid
from typing import Any

Message = dict[str, Any]
"""A UIMessage of the AI SDK, as the page shows it: `id`, `role`, `parts`."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS chats (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, used REAL NOT NULL DEFAULT 0,
    asked TEXT NOT NULL DEFAULT '0', position TEXT NOT NULL DEFAULT '0'
);
CREATE TABLE IF NOT EXISTS messages (
    n INTEGER PRIMARY KEY AUTOINCREMENT, chat TEXT NOT NULL, id TEXT NOT NULL, message TEXT NOT NULL, UNIQUE (chat, id)
);
CREATE INDEX IF NOT EXISTS owners ON chats (owner);
CREATE INDEX IF NOT EXISTS said ON messages (chat, n);
"""

EMPTY_SECS = 24 * 3600
"""How long a chat in which nothing was said is kept after its page was open."""


class Store:
    """Any number of processes of one machine may have one for the same file."""

    def __init__(self, path: str) -> None:
        self._db = sqlite3.connect(path)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.executescript(SCHEMA)
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            # A database may be from before chats had these.
            columns = [name for _, name, *_ in self._db.execute("PRAGMA table_info(chats)")]
            if "used" not in columns:
                self._db.execute("ALTER TABLE chats ADD COLUMN used REAL NOT NULL DEFAULT 0")
                self._db.execute("UPDATE chats SET used = ?", (time.time(),))
            if "asked" not in columns:
                self._db.execute("ALTER TABLE chats ADD COLUMN asked TEXT NOT NULL DEFAULT '0'")
            self._drop_empty("1")

    def create(self, owner: str) -> str:
        chat = uuid.uuid4().hex
        with self._db:
            self._drop_empty("owner = ?", owner)
            self._db.execute("INSERT INTO chats (id, owner, used) VALUES (?, ?, ?)", (chat, owner, time.time()))
        return chat

    def use(self, chat: str) -> None:
        """Keeps a chat whose page is open."""
        with self._db:
            self._db.execute("UPDATE chats SET used = ? WHERE id = ?", (time.time(), chat))

    def belongs(self, chat: str, owner: str) -> bool:
        query = "SELECT 1 FROM chats WHERE id = ? AND owner = ?"
        return self._db.execute(query, (chat, owner)).fetchone() is not None

    def chats(self, owner: str, count: int = 20) -> list[dict[str, str]]:
        """The chats of a user in which something was asked, the latest question first, with the first one as title."""
        query = """
            SELECT id, (SELECT message FROM messages WHERE chat = chats.id ORDER BY n LIMIT 1) AS first FROM chats
            WHERE owner = ? AND first NOT NULL ORDER BY (SELECT MAX(n) FROM messages WHERE chat = chats.id) DESC LIMIT ?
        """
        rows = self._db.execute(query, (owner, count))
        return [{"id": chat, "title": text_of(json.loads(message))} for chat, message in rows]

    def history(self, chat: str) -> tuple[list[Message], str]:
        """What was said, and the position in the log from which the newest answer can be read again."""
        rows = self._db.execute("SELECT message FROM messages WHERE chat = ? ORDER BY n", (chat,)).fetchall()
        (position,) = self._db.execute("SELECT position FROM chats WHERE id = ?", (chat,)).fetchone()
        return [json.loads(message) for (message,) in rows], position

    def ask(self, chat: str, question: Message, entry: str) -> None:
        """Keeps a question, which is an entry of the inbox. One that is asked again loses the answer that it had."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            if not self._advance("asked", chat, entry):
                return
            self._db.execute(
                "DELETE FROM messages WHERE chat = ?1 AND n > (SELECT n FROM messages WHERE chat = ?1 AND id = ?2)",
                (chat, question["id"]),
            )
            self._put(chat, question)

    def begin(self, chat: str, position: str) -> None:
        """Keeps where in the log the newest answer begins."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._advance("position", chat, position)

    def answer(self, chat: str, answer: Message, entry: str, position: str) -> None:
        """Keeps what there is of the answer to an entry, which began at a position: nothing else was asked or begun."""
        query = "SELECT 1 FROM chats WHERE id = ? AND asked = ? AND position = ?"
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            if self._db.execute(query, (chat, entry, position)).fetchone():
                self._put(chat, answer)

    def _advance(self, column: str, chat: str, to: str) -> bool:
        """Tells whether there is nothing later yet: a worker that was frozen comes too late."""
        (now,) = self._db.execute(f"SELECT {column} FROM chats WHERE id = ?", (chat,)).fetchone()
        if order_of(to) < order_of(now):
            return False
        self._db.execute(f"UPDATE chats SET {column} = ? WHERE id = ?", (to, chat))
        return True

    def _drop_empty(self, which: str, *values: str) -> None:
        self._db.execute(
            f"""DELETE FROM chats WHERE {which} AND used < ?
            AND NOT EXISTS (SELECT 1 FROM messages WHERE chat = chats.id)""",
            (*values, time.time() - EMPTY_SECS),
        )

    def _put(self, chat: str, message: Message) -> None:
        self._db.execute(
            """INSERT INTO messages (chat, id, message) VALUES (?, ?, ?)
            ON CONFLICT (chat, id) DO UPDATE SET message = excluded.message""",
            (chat, message["id"], json.dumps(message)),
        )


def order_of(entry: str) -> list[int]:
    """How entries of a stream are ordered: by Redis's clock, and a number."""
    return [int(part) for part in entry.split("-")]


def text_of(message: Message) -> str:
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")
