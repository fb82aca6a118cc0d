"""Figures of answers equal those of the published evaluations: pycocoevalcap, and VQA's definition taken literally."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.rouge.rouge import Rouge

from finetune.evaluation.metrics import (
    cider_d,
    exact_match,
    is_yes_no,
    most_common,
    normalise_vqa,
    rouge_l,
    score,
    tokenise_caption,
    vqa_accuracy,
)

# ---------------------------------------------------------------- exact, most common


def test_exact_match():
    """An exact match is any reference letter by letter."""
    assert exact_match("dog", ("cat", "dog"))
    assert not exact_match("Dog", ("cat", "dog"))
    assert not exact_match("do", ("dog",))


def test_most_common_and_is_yes_no():
    """The most common reference and whether it is yes or no."""
    assert most_common(("no", "yes", "yes")) == "yes"
    assert most_common(("b", "a", "a", "b")) == "b"  # of equals the first
    assert is_yes_no(("maybe", "Yes", "Yes"))
    assert not is_yes_no(("red", "no", "red"))


# ---------------------------------------------------------------- VQA


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("\tTwo\ndogs ", "2 dogs"),  # newlines and tabs are spaces; lower case; number words
        ("none zero one two three four", "0 0 1 2 3 4"),
        ("five six seven eight nine ten eleven", "5 6 7 8 9 10 eleven"),
        ("The dog, a cat and an apple", "dog cat and apple"),  # articles; a comma before a space goes
        ("top-left", "top left"),  # a mark between letters is a space
        ("red -green-blue", "red greenblue"),  # beside a space anywhere, it goes everywhere
        ("1,000", "1000"),  # a comma between digits goes
        ("1,000-2/3", "100023"),  # and takes every other mark with it
        ("3.5 m.p.h.", "3.5 mph"),  # a full stop goes, except before a digit
        ("a.5", "a.5"),
        ("." * 33 + "x", ".x"),  # but 32 of them at most
        ('x;y/z[1]"q"{r}(s)=t+u\\v_w', "x y z 1 q r s t u v w"),
        ("a1-b>c<d@e`f,g?h!", "a1 b c d e f g h"),
        ("it's $5 & 10%: *#", "it's $5 & 10%: *#"),  # marks that the rules do not name
        ("dont couldn'tve ow's'at", "don't couldn't've 'ow's'at"),
        ("im ive Im", "im ive im"),  # the table has them in capitals, which lower-cased words never match
        ("somebody'd", "somebodyd"),  # an entry the wrong way round
        ("don't", "don't"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normalise_vqa_rules(text, normalised):
    """The rules of VQA's normalisation."""
    assert normalise_vqa(text) == normalised


PUBLISHED = """
aint>ain't arent>aren't cant>can't couldve>could've couldnt>couldn't couldn'tve>couldn't've couldnt've>couldn't've
didnt>didn't doesnt>doesn't dont>don't hadnt>hadn't hadnt've>hadn't've hadn'tve>hadn't've hasnt>hasn't havent>haven't
hed>he'd hed've>he'd've he'dve>he'd've hes>he's howd>how'd howll>how'll hows>how's isnt>isn't itd>it'd itd've>it'd've
it'dve>it'd've itll>it'll let's>let's maam>ma'am mightnt>mightn't mightnt've>mightn't've mightn'tve>mightn't've
mightve>might've mustnt>mustn't mustve>must've neednt>needn't notve>not've oclock>o'clock oughtnt>oughtn't
ow's'at>'ow's'at 'ows'at>'ow's'at 'ow'sat>'ow's'at shant>shan't shed've>she'd've she'dve>she'd've she's>she's
shouldve>should've shouldnt>shouldn't shouldnt've>shouldn't've shouldn'tve>shouldn't've somebody'd>somebodyd
somebodyd've>somebody'd've somebody'dve>somebody'd've somebodyll>somebody'll somebodys>somebody's someoned>someone'd
someoned've>someone'd've someone'dve>someone'd've someonell>someone'll someones>someone's somethingd>something'd
somethingd've>something'd've something'dve>something'd've somethingll>something'll thats>that's thered>there'd
thered've>there'd've there'dve>there'd've therere>there're theres>there's theyd>they'd theyd've>they'd've
they'dve>they'd've theyll>they'll theyre>they're theyve>they've twas>'twas wasnt>wasn't wed've>we'd've we'dve>we'd've
weve>we've werent>weren't whatll>what'll whatre>what're whats>what's whatve>what've whens>when's whered>where'd
wheres>where's whereve>where've whod>who'd whod've>who'd've who'dve>who'd've wholl>who'll whos>who's whove>who've
whyll>why'll whyre>why're whys>why's wont>won't wouldve>would've wouldnt>wouldn't wouldnt've>wouldn't've
wouldn'tve>wouldn't've yall>y'all yall'll>y'all'll y'allll>y'all'll yall'd've>y'all'd've y'alld've>y'all'd've
y'all'dve>y'all'd've youd>you'd youd've>you'd've you'dve>you'd've youll>you'll youre>you're youve>you've
"""
CONTRACTIONS = dict(pair.split(">") for pair in PUBLISHED.split())


def test_normalise_vqa_contractions():
    """The contractions are the published ones."""
    assert len(CONTRACTIONS) == 116
    for written, meant in CONTRACTIONS.items():
        assert normalise_vqa(written) == meant
    untouched = "were well shell ill id its lets somebodyd shes hell shed wed"
    assert normalise_vqa(untouched) == untouched


NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}


def naive_normal(text):
    """The rules of the VQA evaluation, letter by letter."""
    text = "".join(" " if letter in "\n\t" else letter for letter in text).strip()
    commas = [index for index, letter in enumerate(text) if letter == "," and 0 < index < len(text) - 1]
    thousands = any(text[index - 1].isdecimal() and text[index + 1].isdecimal() for index in commas)
    kept = []
    for letter in text:
        if letter not in set(';/[]"{}()=+\\_-><@`,?!'):
            kept.append(letter)
        elif not thousands and letter + " " not in text and " " + letter not in text:
            kept.append(" ")
    removed, letters = 0, []
    for letter, after in zip(kept, [*kept, ""][1:], strict=True):
        if letter == "." and not after.isdecimal() and removed < 32:
            removed += 1
        else:
            letters.append(letter)
    words = []
    for word in "".join(letters).lower().split():
        word = NUMBERS.get(word, word)
        if word not in {"a", "an", "the"}:
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


def naive_vqa(answer, references):
    """Each human left out in turn; the others who agree with the answer count a third each, up to one."""
    plain = [" ".join(reference.replace("\t", "\n").split("\n")).strip() for reference in references]
    answer = " ".join(answer.replace("\t", "\n").split("\n")).strip()
    if any(reference != plain[0] for reference in plain):
        plain, answer = [naive_normal(reference) for reference in plain], naive_normal(answer)
    scores = []
    for left_out in range(len(plain)):
        agreeing = 0
        for index, reference in enumerate(plain):
            agreeing += index != left_out and reference == answer
        scores.append(1.0 if agreeing >= 3 else agreeing / 3)
    return sum(scores) / len(scores)


SHORT = st.lists(
    st.one_of(
        st.sampled_from([*CONTRACTIONS, *NUMBERS, "a", "An", "the", "dog", "Dogs.", "1,000", "3.5", "\n", "\t", " "]),
        st.text(alphabet=";/[]\"{}()=+\\_-><@`,?!.:'$ 12ab", max_size=8),
    ),
    max_size=5,
).flatmap(lambda words: st.sampled_from(["", " "]).map(lambda between: between.join(words)))


@given(SHORT)
@settings(max_examples=300, deadline=None)
def test_normalise_vqa_literally(text):
    """Normalisation equals the rules taken literally."""
    assert normalise_vqa(text) == naive_normal(text)


@st.composite
def asked_of_ten(draw):
    """An answer and up to ten references, of which some agree."""
    said = st.sampled_from(draw(st.lists(SHORT, min_size=1, max_size=4)))
    return draw(said), draw(st.lists(said, min_size=1, max_size=10))


@given(asked_of_ten())
@settings(max_examples=200, deadline=None)
@example(("Red.", ["red"] * 10))
@example(("Red.", ["red"] * 9 + ["blue"]))
@example(("dog", ["dog"]))
def test_vqa_accuracy_leaves_each_out(case):
    """VQA accuracy equals leaving each human out."""
    answer, references = case
    assert vqa_accuracy(answer, references) == pytest.approx(naive_vqa(answer, references), abs=1e-12)


@pytest.mark.parametrize(
    ("said_so", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (9, 1.0), (10, 1.0)]
)
def test_vqa_accuracy_of_ten(said_so, accuracy):
    """VQA accuracy by how many of ten said so."""
    references = ["dog"] * said_so + ["cat", "cow", "hen", "fox", "owl", "ant", "bee", "rat", "bat", "elk"][said_so:]
    assert vqa_accuracy("dog", references) == pytest.approx(accuracy)


def test_vqa_accuracy_unanimous():
    """Both sides are normalised unless all humans said the same."""
    assert vqa_accuracy("Two Dogs.", ["the 2 dogs"] * 9 + ["cats"]) == 1
    assert vqa_accuracy("Two Dogs.", ["2 dogs"] * 10) == 0
    assert vqa_accuracy(" Two\tDogs\n", ["Two Dogs"] * 10) == 1
    assert vqa_accuracy("Yes", ["yes", "yes\n", " yes"] * 3) == 0  # the same, apart from white space at the ends


def test_vqa_accuracy_fewer_than_ten():
    """VQA accuracy of fewer than ten."""
    assert vqa_accuracy("dog", ["dog"]) == 0
    assert vqa_accuracy("dog", ["dog"] * 3) == pytest.approx(2 / 3)
    assert vqa_accuracy("dog", ["dog", "dog", "cat"]) == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)


# ---------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A dog on a mat.", ["a", "dog", "on", "a", "mat"]),
        ("The dog's ball isn't; it can't!", ["the", "dog", "'s", "ball", "is", "n't", "it", "ca", "n't"]),
        ("They’re “here” (now), we'll see", ["they", "'re", "here", "now", "we", "'ll", "see"]),
        ("a black-and-white cat - asleep...", ["a", "black-and-white", "cat", "asleep"]),
        ("1,000 dogs at 10:30, 3.5 m", ["1,000", "dogs", "at", "10:30", "3.5", "m"]),
        ("Ein Café\nim Größten", ["ein", "café", "im", "größten"]),
        ("?! ...", []),
    ],
)
def test_tokenise_caption(text, tokens):
    """Captions are words in lower case without punctuation."""
    assert tokenise_caption(text) == tokens


WORD = st.sampled_from(["a", "dog", "on", "the", "mat", "runs"])
CAPTION = st.lists(WORD, min_size=1, max_size=12).map(" ".join)
ITEM = st.tuples(st.one_of(CAPTION, st.just("")), st.lists(CAPTION, min_size=1, max_size=5))
ITEMS = st.lists(ITEM, min_size=1, max_size=8)

HAND_WRITTEN = [
    ("a dog runs on the grass", ["a dog is running on the grass", "the brown dog runs across a field"]),
    ("a man rides a horse", ["a man riding a brown horse", "man on horse", "a person rides a horse on the beach"]),
    ("two cats", ["two cats sleeping on a red sofa", "cats asleep on the couch"]),
    ("the the the the", ["the bus is parked on the street"]),
    ("a plate of food on a table", ["a plate of food on a table", "some food on a plate"]),
]


def published_cider(items):
    scorer = CiderScorer(n=4, sigma=6.0)
    for answer, references in items:
        scorer += (answer, references)
    return scorer.compute_score()[1].tolist()


@given(ITEMS)
@settings(max_examples=150, deadline=None)
@example(HAND_WRITTEN)
@example(HAND_WRITTEN[:1])
def test_cider_d_published(items):
    """CIDEr-D is the published one."""
    answers, references = zip(*items, strict=True)
    assert cider_d(answers, references) == pytest.approx(published_cider(items), abs=1e-9)


def test_cider_d_known_captions():
    """Two items whose references share no word: each n-gram weighs log 2, and equal captions have cosine 1."""
    references = [["one two three four five"], ["six seven eight nine zero"]]
    assert cider_d(["one two three four five", "one"], references) == pytest.approx([10, 0])
    # "one two": cosines 2 / (sqrt 2 sqrt 5), 1 / (sqrt 1 sqrt 4), 0, 0; three words too short
    cosine = (math.sqrt(2 / 5) + 1 / 2) / 4
    assert cider_d(["One, two!", ""], references) == pytest.approx([10 * cosine * math.exp(-9 / 72), 0])
    # "one one" weighs 2 log 2 and is clipped to the reference's log 2: cosine 1 / (2 sqrt 5) of the first length
    cosine = 1 / (2 * math.sqrt(5)) / 4
    assert cider_d(["one one", ""], references) == pytest.approx([10 * cosine * math.exp(-9 / 72), 0])


def test_cider_d_edges():
    """CIDEr-D at its edges."""
    assert cider_d([], []) == []
    assert cider_d(["a dog", "..."], [["?"], ["a cat"]]) == [0, 0]
    assert cider_d(["a dog"], [["a dog"]]) == [0]  # alone in its set, no n-gram tells it apart


@given(CAPTION, st.lists(CAPTION, min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
@example(*HAND_WRITTEN[0])
@example(*HAND_WRITTEN[1])
@example(*HAND_WRITTEN[3])
def test_rouge_l_published(answer, references):
    """ROUGE-L is the published one."""
    assert rouge_l(answer, references) == pytest.approx(Rouge().calc_score([answer], references), abs=1e-9)


def test_rouge_l_known_captions():
    """ROUGE-L of known captions."""
    assert rouge_l("A dog runs.", ["a dog runs"]) == pytest.approx(1)
    # "a dog" of 2 words in 4: precision 1, recall 1/2
    assert rouge_l("a dog", ["a big dog runs"]) == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))
    # the best precision (2/2, of the first) and the best recall (1/1, of the second) meet
    assert rouge_l("a dog", ["a big dog runs", "dog"]) == pytest.approx(1)
    assert rouge_l("dog a", ["a dog"]) == pytest.approx(1 / 2)
    assert rouge_l("", ["a dog"]) == rouge_l("cat", ["a dog"]) == rouge_l("a", ["..."]) == 0


# ---------------------------------------------------------------- which figures apply


def test_score_by_kind_of_references():
    """Each answer gets the figures that apply to it."""
    ten = ("dog",) * 3 + ("cat",) * 7
    captions = ("a dog runs on grass", "a brown dog is running")
    sign = ("welcome to the jungle",) * 7 + ("the jungle welcomes you", "welcome to jungle town", "the jungle is here")
    scores = score(
        ["dog", "dog", "a dog runs on grass", "welcome to the jungle", "a red bus", "a", "red"],
        [("dog",), ten, captions, sign, ("a bus stands there",), ("a red bus",), ("red", "blue")],
    )
    assert [set(figures) for figures in scores] == [
        {"exact"},  # one short reference
        {"exact", "vqa"},  # several short ones
        {"exact", "rouge_l", "cider"},  # sentences
        {"exact", "vqa"},  # a long answer on which people agree is still an answer
        {"exact", "rouge_l", "cider"},  # one sentence, of four words
        {"exact"},  # three words are none
        {"exact", "vqa"},
    ]
    assert scores[1]["vqa"] == pytest.approx(0.9)
    assert [figures["exact"] for figures in scores] == [True, True, True, True, False, False, True]
    expected = cider_d(["a dog runs on grass", "a red bus"], [captions, ("a bus stands there",)])
    assert [scores[2]["cider"], scores[4]["cider"]] == expected
    assert expected[0] > 5 > expected[1] > 0
    assert scores[4]["rouge_l"] == pytest.approx(rouge_l("a red bus", ["a bus stands there"]))


def test_score_of_nothing():
    """Figures of nothing."""
    assert score([], []) == []
