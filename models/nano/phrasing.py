"""Ways to ask for a call: the sentences of the held-out paraphrase sets, and a grammar of requests for training.

A template's `<slot>` stands for one of SLOTS[slot], expanded in turn; `{t}` is the tool's name, `{v} {n}` its action, `{a}` its arguments.
"""
import re

# Held-out phrasings: asking by name, by action, and what follows. Each set was written before the training phrasings that came after it.
PARAPHRASES = {
    "a": (["it would help me a lot to see what {t} gives{a}", "what does {t} answer{a}", "could the {t} utility be put to work{a}",
           "I am curious what {t} returns{a}", "fire off {t}{a}", "we have to rely on {t} here{a}", "my boss asked for a {t} query{a}",
           "perform one {t} operation{a}", "kick off {t}{a}", "this is a job for {t}{a}", "the moment has come for {t}{a}"],
          ["somebody has to {v} {n}{a}", "I was hoping you might {v} {n}{a}", "it would be great to {v} {n}{a}", "any chance you {v} {n}{a}",
           "my plan today is to {v} {n}{a}", "we must {v} {n}{a}", "be so good as to {v} {n}{a}", "the next step is to {v} {n}{a}",
           "your job is to {v} {n}{a}", "do me a favor and {v} {n}{a}"],
          ["", ".", ". I am waiting.", ". That is all I want.", ", if possible.", ". Much appreciated.", " before lunch.", ". Be brief."]),
    "b": (["I wonder whether {t} could sort this out{a}", "nobody but {t} can handle it{a}", "put {t} through its paces{a}",
           "let me have whatever {t} produces{a}", "{t} seems right for that{a}", "without {t} we are stuck{a}", "would {t} be an option{a}",
           "point {t} at it{a}"],
          ["I am supposed to {v} {n}{a}", "the customer insists that we {v} {n}{a}", "high time to {v} {n}{a}", "why not {v} {n}{a}",
           "they told me to {v} {n}{a}", "care to {v} {n}{a}", "I promised to {v} {n}{a}"],
          ["", ".", ", as agreed.", " when you get a moment.", ". Cheers!", ", will you.", ". It cannot wait.", " as soon as possible."]),
    "c": (["would you mind having {t} run{a}", "take {t} for this{a}", "I count on {t} for one lookup{a}", "{t} is what I am after{a}",
           "bring in {t}{a}", "consult {t} a single time{a}", "solve this through {t}{a}", "let us see {t} in action{a}"],
          ["employ {t} a single time to {v} {n}{a}", "the job: {v} {n}{a}", "with one call of {t}, {v} {n}{a}", "someone asked me to {v} {n}{a}",
           "my wish is to {v} {n}{a}", "with {t} at hand, {v} {n}{a}", "you have {t}, so {v} {n}{a}", "we are here to {v} {n}{a}"],
          ["", ".", ". Call it only one time, then summarize.", ", then tell me the outcome and quit.", ". A single call is enough; report back.",
           ". Once you know, say so and end there.", ". Refrain from further calls.", ", no follow-up needed.",
           ". Report what it says and leave it at that.", ", and do not repeat it."]),
}

# Training: asking by name alone, by name and action, by action alone; `<once>` says how often and may be empty.
BY_NAME = [
    "use {t}<once>{a}", "call {t}<once>{a}", "run {t}<once>{a}", "use the <given> {t} tool<once>{a}", "call the <given> tool {t}<once>{a}",
    "<once_> use {t}{a}", "<once_> call {t}{a}", "<once_> run the {t} tool{a}", "a <lone> call of {t}{a}", "a <lone> {t} call{a}",
    "make <one> call to {t}{a}", "issue <one> {t} call{a}", "send <one> request to {t}{a}", "invoke the {t} function<once>{a}",
    "get me an answer from {t}{a}", "let {t} do it{a}", "what would {t} say{a}", "ask {t} about it{a}", "turn to {t}{a}", "set {t} to work{a}",
    "choose {t}{a}", "pick the tool {t}{a}", "rely on the {t} tool{a}", "find out through {t}{a}", "I would like {t} to run<once>{a}",
    "{t} should be <used><once>{a}", "{t} has to be <used><once>{a}", "{t} is the tool to use{a}", "{t} is needed<once>{a}", "{t}, please<once>{a}",
    "the tool for it is {t}{a}", "what we want is {t}{a}", "see what {t} has to say{a}", "I want to know what {t} finds{a}", "try your luck with {t}{a}",
    "can {t} tell us{a}", "is {t} able to do it{a}", "your tool {t} must be <used><once>{a}", "do it by {t}{a}", "do it with {t}<once>{a}",
    "work with {t}{a}", "there is {t} to be <used>{a}", "it takes {t}{a}", "it takes <one> call of {t}{a}", "make use of {t}<once>{a}",
]
BY_BOTH = [
    "use {t}<once> to {v} {n}{a}", "use the {t} tool<once> to {v} {n}{a}", "use the <given> {t} tool<once> to {v} {n}{a}",
    "use the <given> tool {t}<once> to {v} {n}{a}", "call {t}<once> to {v} {n}{a}", "call the {t} function<once> to {v} {n}{a}",
    "run {t}<once> to {v} {n}{a}", "<once_> use {t} to {v} {n}{a}",
    "{v} {n}{a} with {t}<once>", "{v} {n}{a} using {t}<once>", "{v} {n}{a} using the <given> {t} tool<once>", "{v} {n} with {t}<once>{a}",
    "{v} {n} using the tool {t}{a}", "{v} {n}{a} by calling {t}<once>", "{v} {n}{a} through <one> call of {t}", "{v} {n}{a}; use {t}<once>",
    "{v} {n}{a}. Use {t}<once>", "{v} {n}{a}. Call {t}<once>", "{v} {n}{a}; the tool for this is {t}", "{v} {n}{a}, and use {t} for it<once>",
    "{v} {n}{a}. For this call {t}<once>", "{v} {n}{a}. The tool is {t}", "with the help of {t}, {v} {n}{a}", "by means of {t}, {v} {n}{a}",
    "using {t}<once>, {v} {n}{a}", "using the <given> {t} tool, {v} {n}{a}", "by calling {t}<once>, {v} {n}{a}",
    "to {v} {n}{a}, use {t}<once>", "to {v} {n}{a}, call the {t} tool<once>", "in order to {v} {n}{a}, run {t}<once>",
    "make <one> call to {t} to {v} {n}{a}", "have the {t} tool {v} {n}{a}", "let {t} {v} {n}{a}",
    "{t} can {v} {n}{a}: <used_> it<once>", "{t} is there to {v} {n}{a}", "there is {t}: {v} {n}{a}", "ask {t} to {v} {n}{a}",
]
BY_ACTION = [
    "{v} {n}{a}", "{v} {n}{a}", "{v} {n}{a}", "{v} {n}<once>{a}", "{v} {n}{a}<once>", "<once_> {v} {n}{a}", "{v} {n}{a} using the <given> tool<once>",
    "{v} {n}{a} with the <given> tool<once>", "use the <given> tool<once> to {v} {n}{a}", "use a tool to {v} {n}{a}", "use what you have to {v} {n}{a}",
    "with the <given> tool, {v} {n}{a}", "find the right tool and {v} {n}{a}", "{v} {n}{a} by <one> tool call", "make <one> tool call to {v} {n}{a}",
    "I need someone to {v} {n}{a}", "I have been told to {v} {n}{a}", "it is on you to {v} {n}{a}", "what I want is to {v} {n}{a}", "we ought to {v} {n}{a}",
    "the thing to do is {v} {n}{a}", "the plan is to {v} {n}{a}", "there is a need to {v} {n}{a}", "all that is left is to {v} {n}{a}",
    "how do we {v} {n}{a}", "who can {v} {n}{a}", "may I ask you to {v} {n}{a}", "is it possible to {v} {n}{a}", "shall we {v} {n}{a}",
    "are we able to {v} {n}{a}", "my <person> wants to {v} {n}{a}", "the <person> says to {v} {n}{a}", "help my <person> {v} {n}{a}",
]
HERE = ["the directory you are in", "where we are", "the cwd", "our directory", "this very folder", "the folder you run in", "the current dir", "this very directory",
        "our working directory", "the place we are in", "the present working directory", "the directory we work in", "my working folder", "the folder you are in",
        "the local directory", "the local folder", '"."', "`.`", "'.'", "the active directory", "the current location", "the directory at hand"]
OPENINGS = [
    "Please ", "please ", "Can you ", "Could you please ", "I want you to ", "Now ", "Then ", "So ", "Well, ", "Ok: ", "Right, ", "Hi, ", "Hello. ", "Hey! ",
    "Good morning. ", "Dear helper, ", "You there, ", "Your task: ", "Task: ", "Step 1: ", "Request: ", "To do: ", "As a test, ", "For a test, ", "Just ",
    "Simply ", "Kindly ", "Once again, ", "This time, ", "Only this: ", "One thing only: ", "One more thing: ", "Before anything else, ", "To begin with, ",
    "<Since>, ", "<Since>: ", "<Salad>. ", "<Salad>, ", "<Aside> ", "<Aside> <Aside> ", "My <person> <thinks>, but ", "<Since>, so ", "If <clause>, ",
    "When <clause>, ", "While <clause>, ", "Because <clause>, ", "<Without>, ", "<Prep>, ", "<Rule> ", "<Rule> ", "<Report_first> ",
]
TAILS = [
    ", please", " please", ", thanks", " for me", " for us", " for my <person>", " now", " today", " again", " at once", " right now", ", ok", ", right", ", will you please",
    ", if <clause>", " if <clause>", ", when <clause>", " when <clause>", ", since <clause>", ", because <clause>", " while <clause>", ", as <clause>",
    ", so that <clause>", " so <clause>", " before <clause>", " after <clause>", " until <clause>", ", although <clause>", ", even though <clause>",
    " unless <clause>", ", or <clause>", ", for <clause>", ", which is <adj>", ", which the <person> wants", ", as my <person> <says>", ", as <says_so>",
    " <prep>", " <prep>", ", <prep>", ", <prep>", ", <without>", " <without>", " <without>", ", <salad>", ", <salad>", " <salad>", "<once>", "<once>", "<once>",
    "<then> <report>", "<then> <report>", "<then> <report>", "<then> <report><stop>", "<then> <report><stop>", "<then> <report><stop>", "<stop>", "<stop>",
]
SENTENCES = [
    "<Report>.", "<Report><stop>.", "<Report><stop>.", "<Report_first>", "<When>, <report>.", "<When>, <report><stop>.", "<When>, <report> and <end>.", "<End> <after>.",
    "<Rule>", "<Rule>", "<Rule>", "<Rule> <Rule>", "<Aside>", "<Aside>", "<Aside>", "<Salad>.", "<Salad>.", "<Salad>!", "<Since>.", "If <clause>, <clause>.",
    "<Clause>, so <clause>.", "<Clause> because <clause>.", "My <person> <says_> so.", "My <person> <thinks>.", "Then <end>.", "After that <end>.", "Then <report> and <end>.",
]
SLOTS = {
    "once": ["", "", "", "", " once", " exactly once", " just once", " only once", " one time", " exactly one time", " only one time", " no more than once",
             " not more than one time", " precisely once", " once and only once", " once, not twice", " one time only"],
    "once_": ["once", "just once", "only once", "exactly once", "one time", "just one time", "a last time", "only"],
    "given": ["given", "available", "supplied", "offered", "listed", "described", "provided", "right", "matching", "available", "only", "same", "one"],
    "lone": ["single", "lone", "sole", "plain", "simple", "quick"],
    "one": ["one", "just one", "only one", "exactly one", "a", "one single", "a single"],
    "used": ["used", "called", "run", "invoked", "tried", "asked", "started"],
    "used_": ["use", "call", "run", "try", "invoke", "take"],
    "then": [", then", " and then", " and", ". Then", ". After that", ". Afterwards", ", after which", "; then", ", and afterwards", ". Next", ", and when <clause>,"],
    "report": ["report <what>", "report <what>", "report", "tell me <what>", "tell us <what>", "say <what>", "give me <what>", "show me <what>", "repeat <what>",
               "write <what>", "state <what>", "pass on <what>", "sum up <what>", "share <what>", "read out <what>", "answer with <what>", "reply with <what>",
               "let me know <what>", "present <what>", "print <what>", "summarize <what>", "report back", "tell me", "tell my <person> <what>", "give an answer",
               "come back to me", "report <what> to the <person>", "put <what> in words"],
    "what": ["the result", "the results", "what came back", "what it returned", "the outcome", "the answer", "what you saw", "the findings", "everything it said",
             "the output", "what you got", "what it gave", "what happened", "all of it", "it", "the reply", "the response", "what you learned", "the content"],
    "end": ["stop", "stop", "finish", "end", "be done", "halt", "wait", "you are done", "say no more", "do nothing else", "stop there", "leave it", "close", "rest"],
    "stop": [" and <end>", " and <end>", ", then <end>", ", nothing else", ", and that is all", ", no more", " and do no more", " only", ", and then <end>",
             " and nothing more", ", then you may <end>"],
    "when": ["when <done>", "once <done>", "as soon as <done>", "after <done>", "when it is done", "with <what> at hand", "having <what>", "after this"],
    "done": ["the result is there", "you have <what>", "it has run", "the answer comes", "the tool is done", "the tool has answered", "it returns", "the data is in",
             "you know <what>", "the call is over", "the call has come back", "you see <what>"],
    "after": ["after that", "after this", "then", "afterwards", "when <done>", "after <what>", "after <one> call", "as soon as <done>"],
    "rule": ["No other <calls>.", "Do not call anything else.", "Call nothing else.", "Do not use other tools.", "Use no other tool.", "Never call it again.",
             "Do not call it twice.", "No second call.", "One call is all you need.", "One call will do.", "<One> call, no more.", "Only one call.", "Exactly one call.",
             "Just one call, please.", "There must be <one> call.", "Do not repeat the call.", "Not more than one call.", "The tool may run only once.",
             "It must not run twice.", "Do this only once.", "Do it once.", "No <words>.", "Do not write <words>.", "Without <words>, please.", "Do not answer before you have <what>.",
             "Answer only with the call.", "Begin with the call.", "Do not guess.", "Do not invent anything.", "Do not ask me anything.", "Do not add <words>.",
             "Skip the <words>.", "Keep it short.", "You may call it once.", "You are allowed <one> call.", "Make it <one> call.", "Leave the other tools alone.",
             "The other tools are not for this.", "No further steps.", "No more steps after this.", "I expect <one> call.", "Then no more calls."],
    "calls": ["calls", "call", "tool", "tools", "tool call", "steps", "actions", "questions"],
    "words": ["explanation", "comments", "prose", "introduction", "remarks", "small talk", "text before it", "long text", "thoughts", "stories", "apology", "poem"],
    "report_first": ["<Report>, but first this:", "<End> <after>, but first:", "You will <report> later.", "I will want <what>."],
    "since": ["since <clause>", "as <clause>", "because <clause>", "now that <clause>", "given that <clause>", "seeing that <clause>"],
    "prep": ["<prp> <det> <noun>", "<prp> <det> <noun>", "<prp> <det> <adj> <noun>", "<prp> <noun>s", "<adv>", "<adv>"],
    "prp": ["before", "after", "during", "without", "despite", "because of", "like", "as", "until", "since", "beyond", "against", "between", "thanks to", "instead of"],
    "det": ["the", "the", "a", "my", "our", "this", "that", "your", "every", "no", "some", "their", "his", "her"],
    "adv": ["quickly", "slowly", "soon", "maybe", "perhaps", "really", "carefully", "of course", "at least", "at last", "in the end", "for once", "in general", "as ever",
            "in peace", "tonight", "tomorrow", "yesterday", "without fail", "in any case", "by the way", "in a moment", "for now", "all the same", "if ever", "gladly",
            "on time", "in time", "for real", "no matter what", "above all", "later", "first thing", "without delay", "this week", "one day", "some day"],
    "without": ["without <noun>s", "without a <noun>", "with no <noun>", "without <words>", "no <noun>s", "not the <noun>", "and no <noun>s", "with or without <noun>s"],
    "clause": ["<subj> <vi>", "<subj> <vi>", "<subj> <vi> <prep>", "<subj> <vt> <det> <noun>", "<subj> <vt> it", "<subj> <be> <adj>", "it is <adj>", "there is <det> <noun>",
               "<subj> <modal> <inf>", "<subj> <modal> <inf> <prep>", "I <modal> <inf>", "you <modal> <inf>", "we <modal> <inf>", "nobody <vi>", "that <vi>", "you <inf> <prep>"],
    "subj": ["he", "she", "it", "my <person>", "the <person>", "the <noun>", "this <noun>", "our <noun>", "everyone", "someone", "nobody", "the <adj> <noun>", "your <person>"],
    "vi": ["waits", "works", "sleeps", "leaves", "left", "agrees", "matters", "knows", "helps", "fits", "arrives", "came", "failed", "ends", "begins", "hurries", "forgot",
           "is here", "is gone", "is away", "was late", "asks", "asked", "insists", "hopes so", "is on the phone", "counts", "depends on it", "has no time"],
    "vt": ["needs", "wants", "likes", "lost", "knows", "forgot", "saw", "waits for", "asked about", "depends on", "has", "found", "hates", "expects", "prefers", "fears"],
    "be": ["is", "is", "was", "seems", "looks", "feels", "will be", "must be", "has been", "is not", "is too", "is very", "gets"],
    "modal": ["can", "cannot", "must", "will", "would", "should", "might", "may", "could", "have to", "want to", "like to", "need to", "used to", "do not", "did not"],
    "inf": ["wait", "sleep", "go home", "know", "see", "help", "work", "leave", "pay", "eat", "rest", "think", "travel", "decide", "agree", "worry", "complain", "hurry",
            "do it myself", "read", "hear", "explain it", "understand", "remember", "trust you", "thank you", "be late", "be sure", "be happy"],
    "thinks": ["thinks it matters", "is waiting", "cannot wait", "says hello", "sends thanks", "would do it", "has no idea", "is in a hurry", "left early", "wants it so"],
    "says": ["said", "wishes", "wanted", "asked", "likes it", "told you", "demands", "hopes", "suggested", "knows"],
    "says_": ["says", "said", "thinks", "wants it", "wishes", "likes it", "demands it"],
    "says_so": ["planned", "promised", "usual", "always", "before", "discussed", "expected", "you know", "you like", "you see", "it were", "a favor", "a test", "a check"],
    "person": ["boss", "friend", "mother", "father", "brother", "sister", "customer", "client", "teacher", "team", "colleague", "manager", "user", "guest", "neighbor", "uncle",
               "editor", "lawyer", "captain", "wife", "husband", "son", "daughter", "partner", "group", "office", "company", "engineer", "owner"],
    "noun": ["meeting", "day", "work", "time", "week", "money", "question", "answer", "problem", "rule", "plan", "test", "train", "weather", "dinner", "coffee", "tea", "door",
             "world", "life", "story", "idea", "reason", "mistake", "deadline", "visit", "game", "holiday", "war", "party", "lesson", "doubt", "trouble", "noise", "wind",
             "fire", "water", "sun", "music", "news", "paper", "office", "call", "chance", "break", "delay", "end", "start", "exam", "speech", "trip", "wedding", "moment"],
    "adj": ["urgent", "important", "late", "early", "tired", "ready", "fine", "good", "bad", "hungry", "busy", "sure", "happy", "sad", "necessary", "possible", "easy", "hard",
            "short", "long", "big", "small", "nice", "kind", "true", "false", "clear", "safe", "free", "new", "old", "last", "next", "strange", "serious", "worth it", "due"],
    "any": """about above across after again against all almost along already also always among and another any anyone around as ask at away back because been before being below
best better between both but by came can come could day did different do does done down during each early either else end enough even ever every everything fact far few first five
for found four from full further gave general give glad go going gone good got great had half hand happy hard has have having he head hear heart help her here high him his hold home
hope hour house how however human hundred idea if important indeed instead into is it its job just keep kind knew know large last late later least leave left less let life light like
little live long look made make many maybe mean might mind moment money month more morning most mother much must near need never new next nice night no none nor not nothing now of off
often oh old on once one only open or other others our out over own part people perhaps person place point power problem put question quite rather ready real really reason rest right
room round said same saw say second see seem seen sense several shall she should side since small so some something soon still story strong such sure take taken tell ten than thank that
the their them then there these they thing think this those though thought three through time to together told tomorrow too took toward true try turn two under until up upon us used
usual very voice wait want was water way we week well went were what when where whether which while white who whole whose why will wish with within without woman wonder word work world
would year yes yesterday yet you young your""".split(),
    "w": ["<any>", "<any>", "<any>", "<any>", "<noun>", "<adj>", "<person>", "<syl>"],
    "salad": ["<w>", "<w> <w>", "<w> <w>", "<w> <w> <w>", "<w> <w> <w>", "<w> <w> <w> <w>", "<w> <w> <w> <w> <w>", "<w> <w>, <w> <w>", "<w> <w> <w> <w> <w> <w> <w>"],
}
_SLOT = re.compile(r"<(\w+)>")


def fill(m, template):
    """`template` with its slots filled by Maker `m`; `<Slot>` is `<slot>` with a capital, `<syl>` an invented word, `<Aside>` a remark."""
    def one(match):
        slot = match[1]
        if slot == "syl":
            return m.syl_word()
        if slot == "Aside":
            return m.aside()
        s = fill(m, m.pick(SLOTS[slot.lower()]))
        return s[:1].upper() + s[1:] if slot[0].isupper() else s
    return _SLOT.sub(one, template)


def request(m, tools, n):
    """-> (calls, a request for them): an opening, the calls, tails, and sentences that ask for nothing more."""
    calls, body = [], ""
    for i in range(n):
        call, core = ask_call(m, m.pick(tools), tools)
        calls.append(call)
        body += (m.pick([" and then ", ", then ", "; also ", ". Then ", " and also ", ". After that ", " and ", ", and ", ". Next, "]) if i else "") + core
    text = (fill(m, m.pick(OPENINGS)) if m.chance(0.55) else "") + body
    text += "".join(fill(m, m.pick(TAILS)) for _ in range(m.pick([0, 0, 1, 1, 1, 2])))
    if m.chance(0.75):
        text = text[0].upper() + text[1:]
    sentences = [fill(m, m.pick(SENTENCES)) for _ in range(m.pick([0, 0, 1, 1, 1, 2, 2, 3]))]
    text += m.pick([".", ".", ".", "!", "?"] if sentences else ["", "", ".", ".", ".", "!", "?", "..."])
    return calls, " ".join([text] + sentences)


def ask_call(m, t, tools):
    """-> (call, the words that ask for it)"""
    args, said = m.arguments(t)
    alone = sum(u["noun"] == t["noun"] or u["folder"] and t["folder"] for u in tools) == 1
    forms = m.pick([BY_NAME, BY_BOTH, BY_ACTION] if t["described"] and alone else [BY_NAME, BY_NAME, BY_BOTH])
    verb, noun = m.action(t)
    template = fill(m, m.pick(forms))
    if said and m.chance(0.08) and "{a}" in template:     # arguments first
        template, said = "{a}, " + template.replace("{a}", ""), said.lstrip(" ,:")
    return (t["name"], args), template.format(t=m.pick(["{}"] * 8 + ["`{}`", '"{}"', "'{}'"]).format(t["name"]), v=verb, n=noun, a=said)

