"""Many clients at once, some of which vanish: every answer is the one that it would have been alone; nothing is left behind."""

import json
import socket
import threading

import openai
from serving import serving

from potstill.serve.shelf import Opening

QUESTIONS = [f"What is {n}?" for n in range(16)]


def ask(client, number, found):
    asked = {"model": "student", "messages": [{"role": "user", "content": QUESTIONS[number]}], "max_tokens": 24}
    drawn = {"temperature": 1.0, "seed": number}  # greedy answers of a random model are all alike
    chunks = client.chat.completions.create(**asked, **drawn, stream=True)
    found[number] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def vanish(site, question):
    body = {"model": "student", "messages": [{"role": "user", "content": question}], "max_tokens": 5000, "stream": True}
    raw = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", site.port), 30) as sock:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        sock.recv(2000)


def test_sixteen_streams_and_clients_that_vanish(pair):
    opening = Opening("torch", 8192, streams=16)
    with (
        serving(pair, opening=opening) as site,
        openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0) as client,
    ):
        alone: dict[int, str] = {}
        for number in range(len(QUESTIONS)):
            ask(client, number, alone)
        before = threading.active_count()
        together: dict[int, str] = {}
        threads = [threading.Thread(target=ask, args=(client, number, together)) for number in range(len(QUESTIONS))]
        threads += [threading.Thread(target=vanish, args=(site, question)) for question in QUESTIONS[:6]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        site.until_idle()
        assert together == alone
        assert len(set(alone.values())) > 8  # else rows that were mixed up would not show
        assert threading.active_count() <= before + 8  # the loop's own pool
        assert site.health()[1]["running"] == 0
