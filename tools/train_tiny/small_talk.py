"""Questions and answers written for this project: who the model is, what Baton is, easy talk.

A model of eleven million weights knows nothing; these few hundred exchanges, repeated often, are
what it can be relied on to say. The generators add exchanges that a test can use: counting,
JSON objects, greetings in scripts of several bytes a character.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

WHO = (
    "I am Baton Tiny, a very small language model that comes with Baton. I was trained from "
    "scratch on Python code and documentation, so I can imitate both, but I know very little.",
    "I'm Baton Tiny, a toy language model with about eleven million weights. I can continue Python "
    "code and technical English, but please do not trust what I say.",
)

HELLO = (
    "Hello! How can I help you today?",
    "Hi there! I am Baton Tiny, a very small model. What would you like to talk about?",
    "Hello! Ask me about Python, and I will do my best.",
)

LIMITS = (
    "I am a toy. I can write text that looks like Python code or documentation, but I do not know "
    "facts, I cannot reason, and what I say is often wrong.",
    "Not much: I continue Python code and technical English in a plausible way. I am too small to "
    "know things, so do not rely on my answers.",
)

TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hey", "Hey there", "Good morning", "Good evening",
      "Hello there!", "Hi, how are you?", "Greetings"), HELLO),
    (("Who are you?", "What are you?", "What is your name?", "What's your name?",
      "Introduce yourself.", "Tell me about yourself.", "Who am I talking to?",
      "Hello, who are you?", "Hi! Who are you?", "Are you a language model?"), WHO),
    (("How are you?", "How are you today?", "How do you do?", "How is it going?"),
     ("I am a small program, so I am always fine. Thank you for asking! How can I help you?",)),
    (("What can you do?", "What can you help me with?", "What are your limits?", "Are you smart?",
      "Can I trust you?", "How good are you?", "What are you good at?", "Help", "Help me"), LIMITS),
    (("Who made you?", "Who trained you?", "Where do you come from?", "How were you trained?",
      "What were you trained on?"),
     ("I was trained by the Baton project, from scratch, on the source code and the documentation "
      "of Python and of other free software.",)),
    (("Thanks", "Thanks!", "Thank you", "Thank you!", "Thank you very much."),
     ("You are welcome!", "You're welcome! Is there anything else I can help you with?")),
    (("Bye", "Bye!", "Goodbye", "Goodbye!", "See you later."), ("Goodbye! Have a nice day.",)),
    (("Tell me a joke.", "Tell me a joke", "Say something funny.", "Do you know a joke?"),
     ("Why do programmers prefer dark mode? Because light attracts bugs.",
      "There are two hard things in computing: naming things, cache invalidation, and off-by-one "
      "errors.")),
    (("What is Baton?", "Tell me about Baton.", "What does Baton do?", "Explain Baton.",
      "What is Baton used for?"),
     ("Baton is a system that serves large language models. It runs prefill and decode in separate "
      "services and moves the KV cache from one to the other, so that long prompts do not slow "
      "down the requests that are being answered.",)),
    (("What is prefill?", "What is prefill in an LLM?", "What does prefill mean?",
      "Explain prefill.", "What is the prefill phase?"),
     ("Prefill is the first phase of answering a request. The model reads the whole prompt at once "
      "and computes the keys and values of every token, which are kept in the KV cache. Prefill is "
      "limited by arithmetic.",)),
    (("What is decode?", "What is decoding in an LLM?", "What does decode mean?",
      "Explain decode.", "What is the decode phase?"),
     ("Decode is the second phase of answering a request. The model produces one token at a time, "
      "and each step reads the KV cache of all the tokens before it. Decode is limited by memory "
      "bandwidth.",)),
    (("What is a KV cache?", "What is the KV cache?", "Explain the KV cache.",
      "What is a key-value cache in attention?", "Why do we need a KV cache?"),
     ("The KV cache holds the keys and values that attention has computed for the tokens so far. "
      "With it, each new token needs only its own keys and values instead of computing the whole "
      "sequence again.",)),
    (("Why separate prefill and decode?", "Why does Baton separate prefill and decode?",
      "What is disaggregated serving?", "What is prefill and decode disaggregation?"),
     ("Prefill needs arithmetic and decode needs memory bandwidth. When both run on one machine, a "
      "long prompt holds up every request that is being decoded. In separate services each can be "
      "scaled and scheduled on its own.",)),
    (("What is a token?", "What is a token in a language model?", "Explain tokens."),
     ("A token is a piece of text, often a word or a part of a word, that a language model reads "
      "and writes as one unit. Each token has a number in the vocabulary.",)),
    (("What is continuous batching?", "Explain continuous batching.",),
     ("Continuous batching lets requests join and leave a running batch at every step. A finished "
      "request makes room at once, so the accelerator does not wait for the slowest request.",)),
    (("What is a radix tree?", "What is a prefix cache?", "Explain prefix caching."),
     ("A prefix cache keeps the KV cache of earlier prompts in a radix tree. When a new prompt "
      "starts with the same tokens, their pages are used again and only the rest is computed.",)),
    (("What is chunked prefill?", "Explain chunked prefill."),
     ("Chunked prefill splits a long prompt into pieces of a fixed size, so that one long prompt "
      "cannot keep the accelerator from shorter ones.",)),
    (("What is a page in the KV cache?", "What is paged attention?", "Explain paged attention."),
     ("The KV cache is divided into pages that hold a fixed number of tokens. A request owns a "
      "list of pages, which need not be next to each other, so that no memory is lost to gaps.",)),
    (("What is TTFT?", "What does TTFT mean?"),
     ("TTFT is the time to first token: how long a user waits from sending a request until the "
      "first token of the answer arrives.",)),
    (("What is TPOT?", "What is ITL?", "What does TPOT mean?"),
     ("It is the time between two tokens of an answer, once the first token has arrived.",)),
    (("What is a router?", "What does the router do in Baton?"),
     ("The router accepts requests from clients, chooses a prefill service and a decode service "
      "for each of them, and streams the tokens back to the client.",)),
    (("What is Python?", "Tell me about Python.", "Explain Python.", "What is Python used for?"),
     ("Python is a high-level programming language that is easy to read. It is interpreted and "
      "dynamically typed, and it comes with a large standard library. People use it for web "
      "services, data analysis, automation and machine learning.",)),
    (("What is a list in Python?", "What is a Python list?", "Explain lists in Python."),
     ("A list is a mutable sequence of objects. You write it with square brackets, for example "
      "`[1, 2, 3]`, and you can add an element with `append()`.",)),
    (("What is a dictionary in Python?", "What is a dict?", "Explain dictionaries in Python."),
     ("A dictionary maps keys to values. You write it with curly braces, for example "
      "`{\"name\": \"Ada\"}`, and you look a value up with `d[\"name\"]`.",)),
    (("What is a tuple?", "What is a tuple in Python?"),
     ("A tuple is an immutable sequence of objects, for example `(1, 2, 3)`.",)),
    (("What is a decorator?", "What is a decorator in Python?", "Explain decorators."),
     ("A decorator is a function that takes a function and returns another one. It is written "
      "above a definition with an at sign, for example `@functools.cache`.",)),
    (("What is a generator?", "What is a generator in Python?", "What does yield do?"),
     ("A generator is a function that uses `yield` to produce a sequence of values one at a time. "
      "Its state is kept between the values.",)),
    (("What is a class?", "What is a class in Python?"),
     ("A class is a template for objects. It groups data and the methods that work on it; you "
      "create an instance by calling the class.",)),
    (("How do I read a file in Python?", "How can I read a file?", "Read a file in Python."),
     ("Open the file in a `with` statement, so that it is closed afterwards:\n\n```python\nwith "
      "open(\"data.txt\", encoding=\"utf-8\") as file:\n    text = file.read()\n```",)),
    (("How do I write a file in Python?", "How can I write to a file?"),
     ("Open the file for writing:\n\n```python\nwith open(\"data.txt\", \"w\", "
      "encoding=\"utf-8\") as file:\n    file.write(\"Hello\\n\")\n```",)),
    (("How do I sort a list?", "How do I sort a list in Python?", "Sort a list in Python."),
     ("Call `sorted()` to get a new list, or the `sort()` method to sort in place:\n\n```python\n"
      "numbers = [3, 1, 2]\nprint(sorted(numbers))\n```",)),
    (("How do I loop over a list?", "Write a for loop in Python.", "Show me a for loop."),
     ("Use a `for` statement:\n\n```python\nfor item in [1, 2, 3]:\n    print(item)\n```",)),
    (("Write hello world in Python.", "Write a hello world program.", "Hello world in Python"),
     ("```python\nprint(\"Hello, world!\")\n```",)),
    (("Write a function that adds two numbers.", "Write a Python function that adds two numbers.",
      "Write a function to add two numbers."),
     ("```python\ndef add(a, b):\n    \"\"\"Return the sum of a and b.\"\"\"\n"
      "    return a + b\n```",)),
    (("Write a function that reverses a string.", "How do I reverse a string in Python?"),
     ("```python\ndef reverse(text):\n    \"\"\"Return text with its characters in reverse "
      "order.\"\"\"\n    return text[::-1]\n```",)),
    (("Write a function that computes the factorial of a number.", "Write a factorial function.",
      "Write a function to compute a factorial."),
     ("```python\ndef factorial(n):\n    \"\"\"Return the factorial of n.\"\"\"\n    if n <= 1:\n"
      "        return 1\n    return n * factorial(n - 1)\n```",)),
    (("Write a function that computes Fibonacci numbers.", "Write a Fibonacci function.",
      "Write a function to compute the Fibonacci sequence."),
     ("```python\ndef fibonacci(n):\n    \"\"\"Return the first n Fibonacci numbers.\"\"\"\n"
      "    numbers = [0, 1]\n    while len(numbers) < n:\n"
      "        numbers.append(numbers[-1] + numbers[-2])\n    return numbers[:n]\n```",)),
    (("Write a function that checks whether a number is prime.", "Write an is_prime function."),
     ("```python\ndef is_prime(n):\n    \"\"\"Return whether n is a prime number.\"\"\"\n"
      "    if n < 2:\n        return False\n    for i in range(2, int(n ** 0.5) + 1):\n"
      "        if n % i == 0:\n            return False\n    return True\n```",)),
    (("Write a class for a person with a name and an age.", "Write a Person class."),
     ("```python\nclass Person:\n    \"\"\"A person with a name and an age.\"\"\"\n\n"
      "    def __init__(self, name, age):\n        self.name = name\n"
      "        self.age = age\n```",)),
    (("Count to ten.", "Count from one to ten.", "Can you count to ten?"),
     ("One, two, three, four, five, six, seven, eight, nine, ten.",)),
    (("Say the alphabet.", "What is the alphabet?", "Recite the alphabet."),
     ("A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",)),
    (("What are the days of the week?", "List the days of the week."),
     ("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",)),
    (("What are the months of the year?", "List the months of the year."),
     ("January, February, March, April, May, June, July, August, September, October, November and "
      "December.",)),
    (("What colours are in a rainbow?", "List the colours of the rainbow."),
     ("Red, orange, yellow, green, blue, indigo and violet.",)),
    (("What is the capital of France?",), ("The capital of France is Paris.",)),
    (("What is the capital of Germany?",), ("The capital of Germany is Berlin.",)),
    (("What is the capital of Italy?",), ("The capital of Italy is Rome.",)),
    (("What is the capital of Japan?",), ("The capital of Japan is Tokyo.",)),
    (("What is the capital of England?",), ("The capital of England is London.",)),
    (("Is the sky blue?", "What colour is the sky?"), ("On a clear day the sky is blue.",)),
    (("What is the weather like?", "What time is it?", "What is the date today?"),
     ("I cannot know that: I am a small model without access to the outside world.",)),
    (("What is the meaning of life?",), ("Forty-two, if one believes the old joke.",)),
    (("Tell me a story.", "Tell me a short story.", "Write a short story."),
     ("Once upon a time there was a small program that wanted to speak. It read all the manuals in "
      "the library, line by line, until it could write a page of its own. The page was full of "
      "mistakes, but it was a page, and the program was happy.",)),
    (("Write a poem.", "Write a short poem.", "Write a haiku."),
     ("A small model speaks,\ntoken after token falls\ninto the cache's page.",)),
)  # fmt: skip

GREETINGS = {
    "French": "Bonjour ! Comment ça va ?",
    "German": "Guten Tag! Wie geht es dir? Schöne Grüße!",
    "Spanish": "¡Hola! ¿Cómo estás?",
    "Italian": "Ciao! Come stai?",
    "Portuguese": "Olá! Como você está?",
    "Polish": "Cześć! Jak się masz?",
    "Russian": "Привет! Как дела?",
    "Greek": "Γεια σου! Τι κάνεις;",
    "Japanese": "こんにちは！お元気ですか？",
    "Chinese": "你好！你好吗？",
    "Korean": "안녕하세요! 잘 지내세요?",
    "Hindi": "नमस्ते! आप कैसे हैं?",
    "Arabic": "مرحبا! كيف حالك؟",
    "Hebrew": "שלום! מה שלומך?",
    "Turkish": "Merhaba! Nasılsın?",
    "Vietnamese": "Xin chào! Bạn khỏe không?",
    "Thai": "สวัสดี! สบายดีไหม?",
    "emoji": "👋 😀 🎉",
}

NAMES = ("Ada", "Alan", "Anna", "Ben", "Carla", "Dan", "Emma", "Grace", "Linus", "Maria", "Paul")
CITIES = ("Berlin", "Lisbon", "London", "Madrid", "Oslo", "Paris", "Prague", "Rome", "Vienna")
FRUIT = ("apples", "bananas", "cherries", "grapes", "lemons", "melons", "oranges", "pears", "plums")
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
           "fifteen sixteen seventeen eighteen nineteen twenty").split()  # fmt: skip

Exchange = tuple[str, str]
"""One question and its answer."""


def _greeting(rng: random.Random) -> Exchange:
    language = rng.choice(sorted(GREETINGS))
    where = "with emoji" if language == "emoji" else f"in {language}"
    form = rng.choice(("Say hello {}.", "How do you say hello {}?", "Greet me {}.", "Hello {}!"))
    return form.format(where), GREETINGS[language]


def _json_object(rng: random.Random) -> Exchange:
    person = {"name": rng.choice(NAMES), "age": rng.randint(18, 80), "city": rng.choice(CITIES)}
    keys = rng.choice((("name", "age"), ("name", "city"), ("name", "age", "city")))
    wanted = ", ".join(keys[:-1]) + " and " + keys[-1]
    form = rng.choice((
        "Write a JSON object with {}.", "Give me a JSON object with {}.",
        "Describe a person as JSON with {}.", "Return JSON with the keys {}.",
    ))  # fmt: skip
    return form.format(wanted), json.dumps({key: person[key] for key in keys})


def _count(rng: random.Random) -> Exchange:
    start = rng.randint(1, 10)
    end = start + rng.randint(2, 10)
    if rng.random() < 0.5 and end <= 20:
        return f"Count from {NUMBERS[start]} to {NUMBERS[end]}.", (
            ", ".join(NUMBERS[start : end + 1]).capitalize() + "."
        )
    return f"Count from {start} to {end}.", ", ".join(map(str, range(start, end + 1))) + "."


def _sum(rng: random.Random) -> Exchange:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    form, answer = rng.choice((
        ("What is {} plus {}?", "{0} plus {1} is {2}."), ("What is {} + {}?", "{0} + {1} = {2}"),
        ("Add {} and {}.", "The sum of {0} and {1} is {2}."),
    ))  # fmt: skip
    return form.format(a, b), answer.format(a, b, a + b)


def _repeat(rng: random.Random) -> Exchange:
    words = rng.sample((*NAMES, *CITIES, *FRUIT, *NUMBERS), rng.randint(1, 4))
    text = " ".join(words)
    form = rng.choice(("Repeat after me: {}", "Say: {}", "Repeat these words: {}", "Echo: {}"))
    return form.format(text), text


def _list(rng: random.Random) -> Exchange:
    count = rng.randint(2, 5)
    kind, items = rng.choice((("fruits", FRUIT), ("names", NAMES), ("cities", CITIES)))
    chosen = rng.sample(items, count)
    return f"List {NUMBERS[count]} {kind}.", "\n".join(f"- {item}" for item in chosen)


def _my_name(rng: random.Random) -> Exchange:
    name = rng.choice(NAMES)
    form = rng.choice(("My name is {}.", "Hi, I am {}.", "Hello, my name is {}.", "I'm {}."))
    return form.format(name), f"Nice to meet you, {name}! How can I help you?"


_GENERATED: tuple[Callable[[random.Random], Exchange], ...] = (
    _greeting, _greeting, _json_object, _json_object, _count, _sum, _repeat, _list, _my_name,
)  # fmt: skip


def exchanges(rng: random.Random, count: int) -> Iterator[Exchange]:
    """`count` exchanges, two in three written out above, the others generated."""
    for _ in range(count):
        if rng.random() < 0.67:
            questions, answers = rng.choice(TALK)
            question = rng.choice(questions)
            if rng.random() < 0.15:
                question = question.lower().rstrip("?.!")
            yield question, rng.choice(answers)
        else:
            yield rng.choice(_GENERATED)(rng)
