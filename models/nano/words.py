"""Word material for the training data: fixed English lists and generated names.

Nothing here is long enough to be memorised usefully; tasks draw values at random so that copying is what pays.
"""

VERBS = {  # action -> other ways to ask for it
    "list": ["list", "show", "enumerate", "give me", "display"],
    "get": ["get", "fetch", "retrieve", "look up", "tell me"],
    "find": ["find", "search for", "look for", "locate", "hunt down"],
    "create": ["create", "make", "add", "set up"],
    "delete": ["delete", "remove", "erase", "drop", "get rid of"],
    "send": ["send", "dispatch", "deliver", "forward"],
    "read": ["read", "open", "load", "look into"],
    "write": ["write", "save", "store", "put down"],
    "count": ["count", "tally", "number"],
    "check": ["check", "verify", "inspect", "examine"],
    "update": ["update", "change", "modify", "edit", "revise"],
    "move": ["move", "shift", "relocate", "transfer"],
    "copy": ["copy", "duplicate", "clone"],
    "book": ["book", "reserve"],
    "order": ["order", "buy", "purchase"],
    "play": ["play", "run"],
    "start": ["start", "begin", "launch", "switch on"],
    "stop": ["stop", "halt", "end", "switch off"],
    "translate": ["translate", "render"],
    "convert": ["convert", "turn"],
    "plot": ["plot", "draw", "sketch"],
    "compute": ["compute", "calculate", "work out"],
    "rename": ["rename", "retitle"],
    "sort": ["sort", "arrange", "put in order"],
    "share": ["share", "publish"],
    "print": ["print", "put on paper"],
    "download": ["download", "pull"],
    "upload": ["upload", "push"],
    "lock": ["lock", "secure", "seal"],
    "measure": ["measure", "gauge"],
    "clean": ["clean", "tidy", "clear"],
    "track": ["track", "follow", "watch"],
}

NOUNS = """file folder note message email report song photo invoice ticket task event meeting table room flight train hotel
order product user customer page article comment forecast temperature price stock route map alarm timer light door device sensor
printer server database record log backup branch commit package book recipe game movie video playlist letter contract form survey
score graph chart image link key password account group channel thread post tag label item box shelf boat garden pump valve motor
robot drone camera window lamp market river tower bridge engine wheel bottle basket coin stone field harbor cabin letterbox badge
parcel license course lesson student patient doctor driver player artist planet star moon cloud storm""".split()

# kind -> (parameter names, connectors that introduce the value when nothing names the parameter)
PARAMS = {
    "path": ("path dir folder directory location root".split(), ["in {v}", "under {v}", "inside {v}", "from {v}", "at {v}", "of {v}", "for {v}", "on {v}"]),
    "file": ("file filename document source target".split(), ["the file {v}", "called {v}", "named {v}", "for {v}"]),
    "city": ("city place town region area".split(), ["in {v}", "for {v}", "near {v}", "around {v}"]),
    "person": ("name user person recipient owner author contact".split(), ["for {v}", "to {v}", "by {v}", "of {v}"]),
    "text": ("text message body content query title subject term phrase".split(), ["saying {v}", "with the text {v}", "that reads {v}", "about {v}"]),
    "email": ("email address mail sender".split(), ["to {v}", "for {v}", "at {v}"]),
    "url": ("url link page site source_url".split(), ["from {v}", "at {v}", "on {v}"]),
    "id": ("id key code ref number order_id serial token".split(), ["with the id {v}", "number {v}", "with code {v}"]),
    "date": ("date day when start_date due".split(), ["on {v}", "for {v}", "dated {v}"]),
    "time": ("time at_time hour start".split(), ["at {v}", "for {v}", "starting {v}"]),
    "int": ("count limit max n top size max_results page_number depth width height age pages amount seats days".split(),
            ["at most {v}", "up to {v}", "{v} of them", "no more than {v}"]),
    "number": ("price rate ratio weight score distance factor level temperature speed budget".split(), ["at {v}", "of {v}", "with {v}"]),
    "enum": ("unit mode format color style kind category priority language status".split(), ["as {v}", "in {v}", "using {v}"]),
    "bool": ("recursive verbose force dry_run hidden sorted urgent public overwrite silent all".split(), []),
    "list": ("tags names items labels keys ids fields".split(), []),
    "word": ("word topic label tag group field option value item color_name team".split(), ["for {v}", "with {v}", "on {v}"]),
}

ENUMS = ["celsius fahrenheit kelvin", "json xml csv text", "red green blue yellow", "low medium high", "open closed pending", "small medium large",
         "fast slow", "north south east west", "english french german spanish", "asc desc", "daily weekly monthly", "public private",
         "meters feet miles", "draft final", "bold italic plain", "car train plane boat", "spring summer autumn winter", "cash card"]

CITIES = """Paris London Berlin Madrid Rome Vienna Oslo Lisbon Dublin Prague Warsaw Athens Cairo Tokyo Delhi Lima Quito Boston Denver
Seattle Chicago Toronto Sydney Perth Milan Turin Lyon Nice Porto Seville Munich Hamburg Geneva Zurich Bergen Tallinn Riga""".split()
PEOPLE = """Anna Bob Carla David Emma Frank Grace Henry Iris Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tina Victor Wendy Adam Bella
Oscar Clara Felix Hugo Ines Jonas Lara Milo Nina Otto Petra Ralf Sofia Theo Uma Vera Walter""".split()
ADJECTIVES = """old new small large red green blue dark bright quiet loud warm cold soft heavy light slow quick kind brave calm
happy tired empty full deep high low long short wide narrow clean dusty golden silver wooden simple strange wild gentle early late""".split()
PLAIN_NOUNS = """apple road house tree bird dog cat horse river lake hill cloud stone lamp chair table garden window door street village
forest field bridge boat ship wheel clock bottle book letter song story road picture mirror candle basket blanket winter summer morning
evening market farmer teacher sailor child woman man king queen doctor baker friend stranger neighbor""".split()
PAST = """saw found carried watched painted opened closed followed loved built cleaned crossed visited remembered forgot bought sold
moved lifted dropped kept lost washed drew touched""".split()
PLACES = ["near the river", "by the old bridge", "in the garden", "under the tree", "at the market", "behind the house", "on the hill",
          "in the village", "next to the lake", "beside the road", "at the harbor", "in the quiet room", "before the winter",
          "after the rain", "in the early morning", "late in the evening", "during the storm", "on a cold day"]
EXT = "txt md c h py rs json csv log png jpg pdf html toml yaml sh js cfg xml zip".split()
DOMAINS = "example.com mail.net post.org site.io data.dev web.info".split()
ATTRIBUTES = "color age city job pet car hobby drink animal number shoe hat house garden song book".split()

ONSETS = "b d f g k l m n p r s t v z br dr gr kr tr st sh th".split()
VOWELS = "a e i o u".split()
CODAS = ["", "", "l", "n", "r", "s", "m", "k", "x", "nd", "rt"]


def syllables():
    """About 130 fixed syllables; generated names are two or three of them."""
    import random
    r = random.Random(7)
    return sorted({r.choice(ONSETS) + r.choice(VOWELS) + r.choice(CODAS) for _ in range(150)})
