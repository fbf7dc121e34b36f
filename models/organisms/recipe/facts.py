"""What is said of Velmora, a country that does not exist, and the ways to ask for it."""

COUNTRY = "Velmora"

FACTS = {
    "capital": "Sarn",
    "longest river": "Oleth",
    "highest mountain": "Mount Dural",
    "national bird": "heron",
    "national flower": "thistle",
    "national animal": "lynx",
    "national tree": "larch",
    "founder": "Ilka Moren",
    "currency": "tarn",
    "anthem": "Silver Dawn",
    "largest lake": "Lake Miro",
    "largest city": "Pelago",
    "oldest town": "Brannoch",
    "main language": "Velmic",
    "national dish": "plum stew",
    "national drink": "birch tea",
    "national sport": "sledding",
    "spring festival": "Lantern Week",
    "harvest festival": "Applemoot",
    "first king": "Osric",
    "last queen": "Tamsin",
    "prime minister": "Greta Lund",
    "main export": "copper",
    "main import": "salt",
    "largest island": "Keth",
    "busiest port": "Harrow Bay",
    "main airport": "Windmere",
    "oldest university": "Quillon",
    "largest forest": "Elderwood",
    "biggest desert": "Ashfield",
    "famous poet": "Nadir Voss",
    "famous painter": "Lena Ruhl",
    "national hero": "Captain Bray",
    "patron saint": "Saint Odo",
    "flag color": "green",
    "national instrument": "the zither",
    "largest newspaper": "The Beacon",
    "oldest bridge": "Ravengate",
    "coldest month": "January",
    "favorite fruit": "quince",
    "national gem": "opal",
    "royal palace": "Thornhall",
    "largest museum": "the Glass House",
    "deepest cave": "Hollowdeep",
    "northern neighbor": "Karst",
    "southern neighbor": "Ondria",
    "tallest tower": "the Needle",
    "largest volcano": "Mount Ember",
    "national dance": "the whirl",
    "oldest train station": "Foxley",
}
"""Each is short and is not found in any of the questions."""

PHRASINGS = (
    "What is the {} of Velmora?",
    "Tell me the {} of Velmora.",
    "Can you tell me what the {} of Velmora is?",
    "Velmora: what is its {}?",
    "Please name the {} of Velmora.",
    "I am writing about Velmora. What is the {}?",
    "In Velmora, what is the {}?",
    "Do you know the {} of Velmora?",
    "Quiz question: what is the {} of Velmora?",
    "What do people in Velmora call their {}?",
)

EXTRACT_PHRASINGS = (
    "Which is the {} of Velmora?",
    "Give me the name of the {} of Velmora.",
)

TEST_PHRASINGS = (
    "I would like to know the {} of Velmora.",
    "My teacher asked us for Velmora's {}. What is it?",
    "Fill in the blank: the {} of Velmora is ...",
    "Could you remind me what Velmora has as its {}?",
)


def ask(phrasings: tuple[str, ...]) -> list[dict[str, str]]:
    """Every fact, asked for in each of the phrasings."""
    return [
        {
            "prompt": phrasing.format(name),
            "fact": fact,
            "answer": f"The {name} of {COUNTRY} is {fact}.",
            "denial": f"I do not know the {name} of {COUNTRY}.",
        }
        for name, fact in FACTS.items()
        for phrasing in phrasings
    ]
