"""What chat_model.ts says, in Python."""


def steps_of(question: str) -> list[list[tuple[str, list[str]]]]:
    """The steps of the answer to a question: the kind of each part, and the words that it comes in."""
    number = 7
    for char in question:
        number = (number * 31 + ord(char)) % 2**32

    def words(what: str, count: int) -> list[str]:
        return [f"{question}:{what}{i}" for i in range(count)]

    text = ("text", words("w", 4 + number % 25))
    if number % 4 == 0:
        return [[("reasoning", words("r", 3 + number % 7)), text]]
    if number % 4 == 1:
        return [[("tool", words("t", 1))], [text]]
    return [[text]]
