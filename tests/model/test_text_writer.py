"""Text writer: a batch writes what each question alone would, seeds decide, and a chat template is used."""

import pytest
import torch

from seedling.model.text_writer import Question, TextWriter

QUESTIONS = [
    Question("Be brief.", "Write."),
    Question("Be brief and kind.", "Write a sentence with Kaitlyn in it."),
    Question("", "x"),
]
GREEDY = {"max_new_tokens": 20, "temperature": 0.0, "top_p": 1.0, "seed": 1}
SAMPLED = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.95}


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_padding_changes_no_answer(llm_folder, family):
    writer = TextWriter(llm_folder(family), dtype="float32")
    together = writer.write(QUESTIONS, **GREEDY)
    assert together == [writer.write([question], **GREEDY)[0] for question in QUESTIONS]
    assert len({answer.text for answer in together}) > 1


def test_an_answer_is_what_generate_alone_writes(llm_folder):
    writer = TextWriter(llm_folder(), dtype="float32")
    (answer,) = writer.write(QUESTIONS[1:2], **GREEDY)
    ids = writer.tokenizer("Be brief and kind.\nWrite a sentence with Kaitlyn in it.\n", return_tensors="pt").input_ids
    written = writer.llm.generate(input_ids=ids, max_new_tokens=20, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    assert answer.text == writer.tokenizer.decode(written, skip_special_tokens=True)
    assert answer.prompt_tokens == ids.shape[1] and 0 < answer.completion_tokens <= 20


def test_the_end_token_ends_a_text_and_does_not_count(llm_folder):
    writer = TextWriter(llm_folder(), dtype="float32")
    (answer,) = writer.write(QUESTIONS[:1], **GREEDY)
    ids = writer.tokenizer(answer.text, add_special_tokens=False).input_ids
    text = writer._text(torch.tensor([*ids[:4], 1, 1, 1]), 9)
    assert text == (writer.tokenizer.decode(ids[:4]), 9, 4)


def test_the_seed_decides_what_is_sampled(llm_folder):
    writer = TextWriter(llm_folder())
    one, same, other = (writer.write(QUESTIONS, **SAMPLED, seed=seed) for seed in (1, 1, 2))
    assert one == same and one != other


def test_a_chat_template_is_used(llm_folder):
    writer = TextWriter(llm_folder(), dtype="float32")
    plain = writer.write(QUESTIONS, **GREEDY)
    writer.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]"
    chat = writer.write(QUESTIONS, **GREEDY)
    for question, answer in zip(QUESTIONS, chat):
        text = f"[system] {question.system} [user] {question.user} [assistant]"
        assert answer.prompt_tokens == len(writer.tokenizer(text).input_ids)
    assert plain != chat


def test_what_does_not_fit_is_named(llm_folder):
    writer = TextWriter(llm_folder())
    with pytest.raises(ValueError, match=r"llm\.path: a prompt of \d+ tokens .* do not fit into the 512 positions"):
        writer.write([Question("x " * 600, "")], **GREEDY)
    with pytest.raises(ValueError, match=r"llm\.dtype = float99"):
        TextWriter(llm_folder(), dtype="float99")
