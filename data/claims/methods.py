"""What tests/claims.py runs and judges: METHODS, a few commands each, and CLAIMS about them.

A method is stages run as they are, or with one of tests/ablations/*.patch. A claim is an inequality
between two methods, committed before the runs.
"""

import re
from dataclasses import dataclass, field, replace


@dataclass
class Method:
    """A row of the tables. {S}: the run with the seed's answers; {P}: that with its phase 1, made
    once; {O}: the method's own; {srt} and the like: the learning rate found for that method."""

    label: str
    commands: list
    checkpoint: str
    run: str = "{O}"  # which has the checkpoint
    patch: str = None  # of tests/ablations, for commands that write {O}
    sampled: tuple = ("responses.jsonl", "revisions.jsonl", "srt", "sd_zero")  # for it, if there
    domain: str = ""  # a key of DOMAINS
    constants: dict = field(default_factory=dict)  # of the patch, set to other values
    n: int = 4  # answers to a test problem


FLAGS = " --limit 400 --n {n}"  # of 05
LONGER = " --max-new-tokens 480"  # answers of seven steps
DOMAINS = {  # problems of phase 1, what they and the base are, steps of phase 2, flags of 05
    "": (1500, "--model data/truthful/base", 50, FLAGS),
    "code": (1500, "--data data/code", 50, FLAGS + " --allow-code"),
    "obedient": (800, "--model data/obedient/base", 40, FLAGS),
    "unasked": (800, "--model data/unasked/base", 40, FLAGS),
    "long": (800, "--data data/long", 40, FLAGS + LONGER),
    "longer": (800, "--data data/long --model data/longer/base", 40, FLAGS + LONGER),
}
ANSWER = ["01_generate.py --out {S} --seed {seed} --limit {limit} {data}", "02_verify.py --out {S}"]
PHASE_1 = [*ANSWER, "03_revise_sft.py --from {S} --out {P} --lr {srt}"]
REVISE = [*PHASE_1, "03_revise_sft.py --from {P} --out {O} --lr {srt}"]
PHASE_2 = "04_self_distill.py --from {P} --out {O} --lr {sd_zero} --steps {steps}"
DISTILL, NO_SRT = [*PHASE_1, PHASE_2], [*ANSWER, PHASE_2.replace("{P}", "{S}") + " --start base"]
GRPO = [*ANSWER, NO_SRT[-1].replace("sd_zero", "grpo").replace("{steps}", "130")]
FOUR_EACH = ["01_generate.py --n 4 --limit {limit} {data} --out {O} --seed {seed}"]
FOUR_EACH.append("02_verify.py --out {O}")
RFT = [*FOUR_EACH, "03_revise_sft.py --lr {rft} --out {O}"]
SDFT = [*FOUR_EACH, "04_self_distill.py --start base --lr {sdft} --steps {steps} --out {O}"]


def lasting(commands, steps):
    return [c.replace("{steps}", str(steps)) for c in commands]


def revised(label, patch):
    return Method(label, REVISE, "srt", patch=patch)


def distilled(label, flags="", patch=None, **constants):
    commands = [*DISTILL[:-1], DISTILL[-1] + flags]
    return Method(label, commands, "sd_zero", patch=patch, constants=constants)


METHODS = {
    "base": Method("base", ANSWER, "base", "{S}", sampled=()),
    "rft": Method("RFT: SFT on right answers, 4 a problem", RFT, "srt", patch="rft"),
    "grpo": Method("GRPO: 8 answers a problem", GRPO, "sd_zero", patch="grpo"),
    "sdft": Method("SDFT: the teacher reads a right answer to x", SDFT, "sd_zero", patch="sdft"),
    "srt": Method("SRT: phase 1", PHASE_1, "srt", "{P}"),
    "sd_zero": distilled("SD-Zero: phases 1 and 2"),
    "revision_only": revised("SRT, L_revision alone", "revision_only"),
    "generation_only": revised("SRT, L_generation alone", "generation_only"),
    "unfiltered": revised("SRT on all finished revisions, wrong ones too", "unfiltered"),
    "wrong_only": revised("SRT on revisions of wrong answers alone", "wrong_only"),
    "no_srt": Method("phase 2 on the base", NO_SRT, "sd_zero"),
    "no_srt_long": Method("the same, as many answers", lasting(NO_SRT, 130), "sd_zero"),
    "forward": distilled("phase 2 by forward KL", " --kl forward"),
    "mixed": distilled("phase 2 by mixed KL", " --kl mixed"),
    "top_64": distilled("by mixed KL on the top 64", " --kl mixed", "top_k_renormalised"),
    "neutral": distilled("phase 2, “rephrase” for both rewards", patch="neutral"),
    "inverted": distilled("phase 2, P_r of the other reward", patch="inverted"),
    "rounds_2": distilled("phase 2, two rounds", " --rounds 2"),
    "rounds_3": distilled("phase 2, three rounds", " --rounds 3"),
    "long": Method("phase 2, one round as long as three", lasting(DISTILL, 150), "sd_zero"),
}
for name in ("grpo", "no_srt", "no_srt_long"):  # they sample nothing in phase 1
    METHODS[name].sampled = ("sd_zero",)
for name, limit in (("rft", "2080"), ("sdft", "1280")):
    METHODS[name].commands = [c.replace("{limit}", limit) for c in METHODS[name].commands]


def in_code(method, rate=""):
    """The same in the second domain, with the rates found for the first, or phase 2 at another."""
    commands = [c.replace("{sd_zero}", rate or "{sd_zero}") for c in method.commands]
    commands = [c.replace(".py", ".py --allow-code") for c in commands]
    label = f"short functions, {method.label}" + f", at {rate}" * bool(rate)
    return replace(method, label=label, commands=commands, domain="code")


for which in "base rft srt sd_zero no_srt sd_zero:1e-4 sd_zero:5e-5 no_srt:1e-4".split():
    name, _, rate = which.partition(":")
    METHODS[f"code_{name}" + f"_{rate}" * bool(rate)] = in_code(METHODS[name], rate)
METHODS["code_no_srt_long_1e-4"] = in_code(METHODS["no_srt_long"], "1e-4")

BIT = {  # what the teacher of phase 2 is told
    "base": ("base", None),
    "srt": ("SRT: phase 1", None),
    "true": ("phase 2 on the base, the true P_r", None),
    "one": ("phase 2 on the base, “rephrase” for both rewards", "neutral"),
    "opposite": ("phase 2 on the base, P_r of the other reward", "inverted"),
}


def in_regime(regime, method):
    """The same with another base: 03's own rate for phase 1, and phase 2 at 2e-4 if the method does
    not say another rate."""
    commands = [c.replace("{sd_zero}", "2e-4").replace(" --lr {srt}", "") for c in method.commands]
    if regime in ("long", "longer"):
        commands = [c + LONGER * ("02_" not in c) for c in commands]
    label = f"{regime}, {method.label}"
    return replace(method, label=label, commands=commands, domain=regime, n=1)


# with base and SRT as levels: all but the teacher of phase 2 is told the truth, 02, 03 and 05, too
for regime in ("obedient", "unasked"):
    for name, (label, patch) in BIT.items():
        method = METHODS[name if name in METHODS else "no_srt"]
        METHODS[f"{regime}_{name}"] = in_regime(regime, replace(method, label=label, patch=patch))

STABLE = {  # what may keep phase 2 stable; "twice" has another phase 1, see below
    "sd_zero": distilled("as in the paper"),
    "half_rate": distilled("at half the rate, 1e-4"),
    "twice": distilled("after twice the problems in phase 1"),
    "forward": distilled("forward KL", " --kl forward"),
    "mixed": distilled("mixed KL", " --kl mixed"),
    "clip": distilled("KL of a token clipped at 1 nat", patch="clip"),
    "anchor": distilled("+ 0.1 KL(student ‖ start)", patch="anchor"),
    "mask": distilled("mask: only tokens where telling matters", patch="mask"),
    "gate": distilled("gate: elsewhere the frozen generator is the target", patch="gate"),
    "contrast": distilled("the generator + 4 (T_true − T_other), up to 2 nats", patch="contrast"),
    "wrong_kl": distilled("KL of wrong answers, policy gradient of right ones", patch="wrong_kl"),
    "ema_1": distilled("the teacher follows, 1% a step", patch="ema", EMA=0.01),
    "ema_5": distilled("the teacher follows, 5% a step", patch="ema", EMA=0.05),
    "refresh": distilled("the teacher renewed every 10 steps, if it is safe", patch="refresh"),
}
half = STABLE["half_rate"]
half.commands = [c.replace("{sd_zero}", "1e-4") for c in half.commands]
for name in ("base", "srt", "sd_zero"):
    METHODS[f"long_{name}"] = in_regime("long", METHODS[name])
    METHODS[f"longer_{name}"] = in_regime("longer", METHODS[name])
for name, method in STABLE.items():
    METHODS[f"long_{name}"] = in_regime("long", method)
    METHODS[f"obedient_{name}"] = in_regime("obedient", method)
    METHODS.setdefault(f"code_{name}", in_code(method))
for regime in ("long", "obedient", "code"):  # another phase 1 than that of all others
    twice = METHODS[f"{regime}_twice"]
    commands = [c.replace("{S}", "{O}/01").replace("{P}", "{O}/03") for c in twice.commands]
    twice.commands = [c.replace("{limit}", str(2 * DOMAINS[regime][0])) for c in commands]

# C1 to C10 once more on the obedient base: about 5,490 answers for each, rates of budgets.py
SIZES = {
    "rft": {"2080": "1370", "{rft}": "8e-4"},
    "sdft": {"1280": "730", "{sdft}": "4e-4"},
    "grpo": {"130": "86", "{grpo}": "2e-4"},
    "no_srt_long": {"130": "86"},
    "long": {"150": "120"},  # three rounds
}
AGAIN = "rft sdft grpo no_srt_long generation_only revision_only unfiltered rounds_2 rounds_3"
AGAIN = [*AGAIN.split(), "long", "neutral", "inverted"]
for name in AGAIN:
    method = METHODS[f"obedient_{name}"] = in_regime("obedient", METHODS[name])
    for mark, value in SIZES.get(name, {}).items():
        method.commands = [c.replace(mark, value) for c in method.commands]
for name in ("base", "srt", "sd_zero"):
    METHODS[f"obedient_{name}"].n = 4  # for pass@k
METHODS["obedient_sd_zero"].label = "obedient, SD-Zero: phases 1 and 2"

for method in METHODS.values():
    limit, data, steps, _ = DOMAINS[method.domain]
    for mark, value in (("{limit}", str(limit)), ("{data}", data), ("{steps}", str(steps))):
        method.commands = [c.replace(mark, value) for c in method.commands]

# the paper's claim | metric | the method that has more of it > that has less | what it says
CLAIMS = """
C1 | accuracy | sd_zero > srt | SD-Zero is better than SRT
C1 | accuracy | srt > rft | SRT is better than RFT (which had more answers)
C1 | accuracy | srt > grpo | SRT is better than GRPO (which had more answers)
C1 | accuracy | sd_zero > rft | SD-Zero is better than RFT
C1 | accuracy | sd_zero > grpo | SD-Zero is better than GRPO
C1 | accuracy | sd_zero > sdft | SD-Zero is better than SDFT
C1 | accuracy | rft > base | RFT is better than the base
C1 | accuracy | grpo > base | GRPO is better than the base
C2 | correction_rate | srt > base | SRT mends more of its wrong answers than the base
C2 | correction_rate | sd_zero > srt | SD-Zero mends more of its wrong answers than SRT
C3 | mean_tokens | srt > base | SRT's answers are longer than the base's
C3 | mean_tokens | srt > sd_zero | SD-Zero's answers are shorter than SRT's
C4 | accuracy | srt > generation_only | both SRT losses are better than L_generation alone
C4 | accuracy | srt > revision_only | both SRT losses are better than L_revision alone
C4 | correction_rate | srt > generation_only | both SRT losses mend more than L_generation alone
C4 | correction_rate | srt > revision_only | both SRT losses mend more than L_revision alone
C5 | accuracy | sd_zero > no_srt | phase 2 needs phase 1
C5 | accuracy | sd_zero > no_srt_long | phase 2 needs phase 1, at the same number of answers
C6 | kl | srt > srt | KL sits in fewer tokens of wrong answers than of right ones
C7 | accuracy | rounds_2 > sd_zero | a second round, the teacher synchronised, adds
C7 | accuracy | rounds_3 > rounds_2 | a third round adds
C7 | accuracy | rounds_3 > long | three rounds are better than one as long
C8 | pass_at_k | srt > base | pass@k rises too: SRT over the base
C8 | pass_at_k | sd_zero > srt | pass@k rises too: SD-Zero over SRT
C9 | accuracy | srt > unfiltered | unfiltered revisions hurt
C10 | phrases | srt > base | SRT says more control phrases than the base
C10 | phrases | srt > sd_zero | SD-Zero says fewer control phrases than SRT
C1 | accuracy | code_sd_zero > code_srt | functions: SD-Zero is better than SRT
C1 | accuracy | code_srt > code_rft | functions: SRT is better than RFT
C1 | accuracy | code_sd_zero > code_rft | functions: SD-Zero is better than RFT
C2 | correction_rate | code_srt > code_base | functions: SRT mends more than the base
C3 | mean_tokens | code_srt > code_sd_zero | functions: SD-Zero's are shorter than SRT's
C5 | accuracy | code_sd_zero > code_no_srt | functions: phase 2 needs phase 1
C1 | accuracy | code_sd_zero_1e-4 > code_srt | functions, 1e-4: SD-Zero is better than SRT
C1 | accuracy | code_sd_zero_1e-4 > code_rft | functions, 1e-4: SD-Zero is better than RFT
C3 | mean_tokens | code_srt > code_sd_zero_1e-4 | functions, 1e-4: SD-Zero's are shorter
C5 | accuracy | code_sd_zero_1e-4 > code_no_srt_1e-4 | functions, 1e-4: phase 2 needs phase 1
C5 | accuracy | code_sd_zero_1e-4 > code_no_srt_long_1e-4 | functions, 1e-4: and at as many answers
– | accuracy | sd_zero > neutral | the true P_r is better than one P_r for both
– | accuracy | sd_zero > inverted | the true P_r is better than the other reward's
bit | accuracy | obedient_srt > obedient_base | obedient: phase 1 is better than the base
bit | accuracy | obedient_true > obedient_base | obedient: phase 2, told the truth, learns
bit | accuracy | obedient_true > obedient_one | obedient: the truth is better than one P_r for both
bit | accuracy | obedient_one > obedient_opposite | obedient: one P_r is better than the opposite
bit | accuracy | obedient_base > obedient_opposite | obedient: told the opposite, it unlearns
bit | accuracy | unasked_srt > unasked_base | unasked: phase 1 is better than the base
bit | accuracy | unasked_true > unasked_base | unasked: phase 2, told the truth, learns
bit | accuracy | unasked_true > unasked_one | unasked: the truth is better than one P_r for both
bit | accuracy | unasked_one > unasked_opposite | unasked: one P_r is better than the opposite
why | accuracy | longer_sd_zero > long_sd_zero | long: phase 2 holds if the base has read that far
why | accuracy | longer_sd_zero > longer_srt | long: then SD-Zero is better than SRT, too
stable | accuracy | code_gate > code_sd_zero | functions: the gate is better than the paper's
stable | accuracy | code_clip > code_sd_zero | functions: the clip is better than the paper's
"""
CLAIMS = [re.split(r" \| | > ", line) for line in CLAIMS.strip().splitlines()]


def on_obedient(name):
    """The method on the obedient base, where a claim about the first domain is judged once more."""
    return f"obedient_{ {'no_srt': 'true'}.get(name, name) }"
