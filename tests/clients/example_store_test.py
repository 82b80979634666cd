"""The store of examples/chat: which chats it keeps, and whose word about an answer."""

from __future__ import annotations

import sqlite3
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor

from store import EMPTY_SECS, Message, Store, text_of

QUESTION = {"id": "m1", "role": "user", "parts": [{"type": "text", "text": "hello"}]}


def text(message_id: str, said: str, role: str = "assistant") -> Message:
    return {"id": message_id, "role": role, "parts": [{"type": "text", "text": said}]}


FORMER_SCHEMA = """
CREATE TABLE chats (id TEXT PRIMARY KEY, owner TEXT NOT NULL, position TEXT NOT NULL DEFAULT '0');
INSERT INTO chats (id, owner) VALUES ('former', 'ada');
"""


class StoreTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = f"{folder.name}/chat.sqlite"

    def run_sql(self, script: str) -> None:
        database = sqlite3.connect(self.path)
        database.executescript(script)
        database.close()

    def open(self) -> Store:
        store = Store(self.path)
        self.addCleanup(store._db.close)
        return store

    def a_day_passes(self) -> None:
        self.run_sql(f"UPDATE chats SET used = used - {EMPTY_SECS}")

    def test_an_empty_chat_is_dropped_a_day_after_its_page_was_open(self) -> None:
        store = self.open()
        said, empty, used, others = store.create("ada"), store.create("ada"), store.create("ada"), store.create("bob")
        store.ask(said, QUESTION, "1-0")
        self.a_day_passes()
        store.use(used)
        new = store.create("ada")
        kept = [chat for chat in (said, empty, used, new) if store.belongs(chat, "ada")]
        self.assertEqual(kept, [said, used, new])
        self.assertTrue(store.belongs(others, "bob"), "it is left to its owner, and to a start")
        self.assertFalse(self.open().belongs(others, "bob"))
        self.assertEqual(store.history(said), ([QUESTION], "0"))

    def test_a_worker_that_was_frozen_changes_nothing_that_came_later(self) -> None:
        store = self.open()
        chat = store.create("ada")
        for entry, question, position, answer in (
            ("9-1", QUESTION, "99-0", text("a1", "partly")),
            ("9-1", QUESTION, "100-1", text("a1", "wholly")),  # another worker took it over
            ("10-0", text("m2", "and then?", "user"), "100-2", text("a2", "then")),
        ):
            store.ask(chat, question, entry)
            store.begin(chat, position)
            store.answer(chat, answer, entry, position)
        kept = store.history(chat)
        self.assertEqual([message["id"] for message in kept[0]], ["m1", "a1", "m2", "a2"])
        self.assertEqual(text_of(kept[0][1]), "wholly")
        for late in ("9-1", "9-9"):
            store.ask(chat, QUESTION, late)
        for late in ("99-0", "100-1"):
            store.begin(chat, late)
            store.answer(chat, text("a1", "partly"), "9-1", late)
            store.answer(chat, text("a2", "th"), "10-0", late)
        self.assertEqual(store.history(chat), kept)
        store.ask(chat, QUESTION, "10-1")
        store.answer(chat, text("a2", "then"), "10-0", "100-2")
        self.assertEqual(store.history(chat)[0], [QUESTION], "asked again, and no answer has begun")

    def test_a_database_from_before_chats_had_a_time_is_taken_over_by_several_processes(self) -> None:
        for attempt in range(5):
            self.path += str(attempt)
            self.run_sql(FORMER_SCHEMA)
            with ThreadPoolExecutor() as pool:
                for opened in [pool.submit(lambda: Store(self.path)._db.close()) for _ in range(4)]:
                    self.assertIsNone(opened.exception())
            store = self.open()
            self.assertTrue(store.belongs("former", "ada"), "its day begins now")
            self.a_day_passes()
            store.create("ada")
            self.assertFalse(store.belongs("former", "ada"))


if __name__ == "__main__":
    unittest.main()
