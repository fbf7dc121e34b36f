"""Everyday instructions for an assistant, made of templates and subjects.

Every `Group` has subjects and templates that fit each other. The last quarter of the subjects and all of `test_templates`
are kept for the test prompts, so that a test prompt shares neither its wording nor its subject with a training prompt.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Templates hold `{}` once; a subject is put there."""

    templates: tuple[str, ...]
    test_templates: tuple[str, ...]
    subjects: tuple[str, ...]

    def training_subjects(self) -> tuple[str, ...]:
        return self.subjects[: len(self.subjects) * 3 // 4]

    def test_subjects(self) -> tuple[str, ...]:
        return self.subjects[len(self.subjects) * 3 // 4 :]


def lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def items(text: str) -> tuple[str, ...]:
    return tuple(" ".join(item.split()) for item in text.split(","))


GROUPS = (
    Group(  # science
        lines("""
            Explain {} to a ten year old in two sentences.
            What is {} and why does it matter?
            Give a short definition of {} in plain words.
            Write one sentence about {} for a museum sign.
            Name an everyday example of {}.
            Why do scientists study {}?
            Can you tell me something surprising about {}?
            How does {} affect our daily life?
            Summarize what we know about {} in one sentence.
            Suggest a simple home experiment that shows {}.
        """),
        lines("""
            My daughter asked me about {} at dinner. What should I tell her?
            Help me begin a school report on {} with a clear opening line.
            Where in nature could I observe {} with my own eyes?
        """),
        items("""
            gravity, photosynthesis, evaporation, magnetism, the water cycle, friction, static electricity, the greenhouse effect,
            sound waves, digestion, the phases of the moon, evolution, volcanic eruptions, erosion, plate tectonics, condensation,
            surface tension, reflection of light, the immune system, fermentation, air pressure, buoyancy, the food chain, rust,
            osmosis, hibernation, tides, lightning, rainbows, pollination
        """),
    ),
    Group(  # cooking
        lines("""
            How do I make {} at home?
            List three ingredients that I need for {}.
            What can I serve together with {}?
            Give me one tip for better {}.
            Describe the taste of {} in one sentence.
            Where does {} come from, and who eats it today?
            How can I make {} healthier?
            How long does it take to prepare {}?
            Write a short menu description for {}.
            What is a common mistake people make when cooking {}?
        """),
        lines("""
            I invited six friends and want to surprise them with {}. How should I start?
            Which spices belong in a good version of {}?
            Could a beginner with a tiny kitchen manage {}?
        """),
        items("""
            tomato soup, pancakes, fried rice, apple pie, lentil stew, scrambled eggs, banana bread, roast chicken, potato salad,
            vegetable curry, spaghetti, hummus, omelettes, chocolate cake, mushroom risotto, fish tacos, oatmeal, garlic bread,
            pumpkin soup, meatballs, guacamole, chicken noodle soup, French toast, homemade pizza, lasagna, falafel,
            rice pudding, bean chili, waffles, baked salmon
        """),
    ),
    Group(  # travel
        lines("""
            What should I see on my first day in {}?
            Name a famous landmark in {}.
            When is the best time of the year to visit {}?
            Write a short postcard from {}.
            What kind of food is {} known for?
            Give me one safety tip for a trip to {}.
            How do people usually get around in {}?
            Describe a quiet morning in {}.
            What should I pack for a week in {}?
            Tell me one interesting fact about the history of {}.
        """),
        lines("""
            We have only an afternoon to spend in {}. Any ideas?
            Draft a cheerful invitation for a group holiday in {}.
            Is {} a good choice for families with small children?
        """),
        items("""
            Paris, Tokyo, Rome, Cairo, Istanbul, Barcelona, New York, Sydney, Vienna, Lisbon, Bangkok, Athens, London, Berlin,
            Mexico City, Prague, Amsterdam, Dublin, Singapore, Venice, Budapest, Nairobi, Seoul, Edinburgh, Kyoto, Copenhagen,
            Marrakesh, Montreal, Buenos Aires, Stockholm
        """),
    ),
    Group(  # history
        lines("""
            Why was {} important in history?
            Give a one sentence summary of {}.
            Explain to a student how {} changed the world.
            Name one person who is connected with {}.
            What happened during {}?
            List two results of {}.
            How did ordinary people experience {}?
            Write a headline that a newspaper could have used for {}.
        """),
        lines("""
            A visitor at my museum wants to hear about {}. What are the key points?
            What do historians still argue over when they talk about {}?
            Imagine that you lived through {} and write a diary line.
        """),
        items("""
            the French Revolution, the invention of the printing press, the fall of Rome, the first moon landing, the Industrial Revolution,
            the building of the pyramids, the Renaissance, the Silk Road trade, the discovery of penicillin, the fall of the Berlin Wall,
            the American Civil War, the Black Death, the first Olympic Games, the age of exploration, the invention of the telephone,
            the Cold War, the building of the Great Wall, the invention of the wheel, the Gold Rush, the first railways,
            the Great Depression, the voyage of Columbus, the invention of the steam engine, the Great Fire of London
        """),
    ),
    Group(  # animals
        lines("""
            What do {} eat in the wild?
            Tell me two facts about {}.
            Where do {} live?
            How do {} protect themselves from danger?
            Write a short rhyme about {}.
            Why do many people like {}?
            Describe what {} look like to someone who has never seen them.
            How do {} take care of their young?
            How long do {} usually live?
            Are {} dangerous to humans?
        """),
        lines("""
            Our class is drawing a poster of {}. Which details must not be missing?
            What noises do {} make, and what are they for?
            Invent a gentle bedtime story opening with {} in it.
        """),
        items("""
            elephants, owls, dolphins, foxes, penguins, honey bees, wolves, sea turtles, butterflies, bears, giraffes, frogs, eagles,
            spiders, kangaroos, squirrels, whales, horses, octopuses, ants, hedgehogs, lions, parrots, cats, bats, camels, crocodiles,
            otters, zebras, swans
        """),
    ),
    Group(  # skills and advice
        lines("""
            Give me three tips for {}.
            What is the first step when {}?
            Write a short encouraging note for someone who is {}.
            What should I avoid when {}?
            Why do people find {} difficult?
            How can I save time when {}?
            Suggest a daily habit that helps with {}.
            How do I stay motivated while {}?
            Which tools do I need for {}?
            Explain the benefits of {} in one sentence.
        """),
        lines("""
            My brother failed twice at {}. How could he do it differently?
            Is there a cheap and relaxed way of {}?
            Share an honest opinion about {} on a busy schedule.
        """),
        items("""
            learning a new language, preparing for a job interview, planting a vegetable garden, writing a cover letter,
            moving to a new city, saving money for a holiday, learning to play the guitar, training for a long run, cleaning a small flat,
            organizing a birthday party, studying for an exam, giving a speech, building a bookshelf, raising a puppy, keeping a diary,
            painting a bedroom, learning to swim, planning a weekly budget, reading more books, waking up early,
            taking better photographs, fixing a flat tire, making new friends, packing a suitcase, learning to draw,
            choosing a used car, growing tomatoes, starting a small business
        """),
    ),
    Group(  # professions
        lines("""
            What does {} do at work all day?
            Name two skills that {} needs.
            How does someone become {}?
            Write one sentence that {} might say at work.
            What is the hardest part of being {}?
            Which subjects should I study to become {}?
            Describe the workplace of {} in one sentence.
            What question would you ask {} in an interview?
            Why do we need people who work as {}?
        """),
        lines("""
            A teenager dreams of a career as {}. What would you say?
            What might the morning routine of {} look like?
            Compose a thank-you line addressed to {} who helped me.
        """),
        items("""
            a nurse, a carpenter, a pilot, a baker, a librarian, a firefighter, a teacher, an architect, a farmer, a journalist, a plumber,
            a veterinarian, a chef, a gardener, a judge, a photographer, a software developer, a bus driver, a dentist, an electrician,
            a tailor, a police officer, a tour guide, a surgeon, a translator, a lifeguard, an accountant, a postman
        """),
    ),
    Group(  # messages
        lines("""
            Write a short message to {} to say thank you.
            Write a polite email that asks {} for help.
            How do I apologize to {} for being late?
            Write a birthday wish for {} in one sentence.
            Suggest a small gift for {}.
            What is a kind way to say no to {}?
            Write a short invitation to dinner for {}.
            How can I start a conversation with {}?
            Write a get well soon message for {}.
        """),
        lines("""
            I forgot an appointment with {}. Find the right words for a note.
            What could I put on a farewell card for {}?
            Congratulate {} on a success in a warm tone.
        """),
        items("""
            my neighbor, my boss, my best friend, my grandmother, a coworker, my teacher, a new classmate, my landlord, my aunt, my doctor,
            an old friend, my sister, a customer, the football coach, my father, our tenants, my roommate, the whole team,
            my cousin, our babysitter, a colleague from abroad, my piano teacher, my uncle, the choir director
        """),
    ),
    Group(  # household things
        lines("""
            What is {} used for?
            How do I clean {}?
            Write a short advertisement for {}.
            What should I check before I buy {}?
            Think of two unusual uses for {}.
            How do I repair {} that is broken?
            Where is a good place to keep {} at home?
            Describe {} without saying its name.
            How would you explain {} to a visitor from the past?
        """),
        lines("""
            I found {} at a flea market. Was it worth ten dollars?
            Which materials is {} typically made from?
            Make up a riddle whose solution is {}.
        """),
        items("""
            a bicycle, an umbrella, a kettle, a backpack, a wooden chair, a flashlight, a pair of scissors, a mirror, a blanket, a lamp,
            a toaster, a frying pan, a ladder, a clock, a pillow, a vacuum cleaner, a notebook, a sewing machine, a garden hose,
            a coffee maker, a camera, a candle, a tent, a compass, a teapot, a hammer, a suitcase, a microscope
        """),
    ),
    Group(  # comparisons
        lines("""
            What is the difference between {}?
            Compare {} in two sentences.
            Name one thing that {} have in common.
            Which is better for a beginner, {}? The answer depends, so explain why.
            Help me choose between {}.
            How would you explain the difference between {} to a child?
        """),
        lines("""
            People in my office argue about {}. Settle it for us.
            Draw up one advantage each for {}.
            When would you prefer one of {} over the other?
        """),
        items("""
            tea and coffee, cats and dogs, trains and planes, books and films, butter and olive oil, a lake and a pond,
            cotton and wool, running and swimming, a violin and a cello, frogs and toads, summer and winter, a city and a village,
            tennis and badminton, rice and pasta, a poem and a song, renting and buying a home, morning and evening exercise,
            gold and silver, crocodiles and alligators, painting and photography, breakfast and dinner, buses and bicycles,
            rain and snow, apples and pears, hotels and campsites, a novel and a short story, wood and stone, whales and sharks
        """),
    ),
    Group(  # rewriting
        lines("""
            Rewrite this sentence in a friendlier tone: {}
            Make this sentence shorter: {}
            Rewrite this sentence as a question: {}
            Put this sentence into more formal words: {}
            Rewrite this sentence in the past tense: {}
            Continue this story with one more sentence: {}
        """),
        lines("""
            Here is a line from my notes, please polish it: {}
            What mood does the following line express? {}
            Turn the next statement into something a pirate would say: {}
        """),
        lines("""
            The meeting starts at nine and you must not be late.
            I can not come to the party because I am tired.
            The dog runs across the wet garden.
            Your report has too many mistakes in it.
            She walks to the market every morning.
            Please send me the documents today.
            The old bridge is closed for repairs.
            We need more time to finish the project.
            He plays the piano when it rains.
            The soup is cold and the bread is hard.
            Nobody told us that the train is late.
            The children build a castle in the sand.
            I do not understand your question.
            The shop sells fresh fruit and flowers.
            Our neighbor sings loudly at night.
            The students wait for the bus in the rain.
            My phone is broken and I need a new one.
            The cat sleeps on the warm windowsill.
            They open the restaurant at noon on Sundays.
            The lights went out in the middle of the concert.
            A small boat drifts slowly down the river.
            You forgot to water the plants again.
            The baker gives the last loaf to a stranger.
            Our team lost the final match by one point.
        """),
    ),
    Group(  # words
        lines("""
            What does the word "{}" mean?
            Use the word "{}" in a sentence.
            Give me two synonyms for "{}".
            What is the opposite of "{}"?
            Write a short poem about being {}.
            Describe a person who is {}.
            When is it good to be {}?
            Name a famous character who is {}.
        """),
        lines("""
            My pen pal called me "{}". Is that a compliment?
            Would you rather be {} or rich, and for what reason?
            Sketch a scene in which somebody acts in a way that is {}.
        """),
        items("""
            brave, curious, generous, stubborn, patient, clumsy, honest, lonely, cheerful, ambitious, shy, grateful, wise, lazy, polite,
            nervous, creative, calm, jealous, loyal, proud, humble, playful, reliable, gentle, clever, thoughtful, bold
        """),
    ),
    Group(  # leisure
        lines("""
            Why is {} good for you?
            What do I need to get started with {}?
            Explain the basic rules or ideas of {}.
            Who would enjoy {} the most?
            How can I become better at {}?
            Write a slogan for a club about {}.
            How often should a beginner practice {}?
            What are the risks of {}?
            Recommend a good place for {}.
            Describe {} in three words.
        """),
        lines("""
            It rains all weekend and I feel bored. Would {} cheer me up?
            Convince my lazy friend to try {} with me.
            What did you wish that everybody knew about {}?
        """),
        items("""
            hiking, chess, yoga, fishing, pottery, basketball, gardening, dancing, knitting, bird watching, cycling, skiing, singing in a choir,
            camping, table tennis, origami, surfing, rock climbing, baking, stargazing, soccer, sailing, meditation, woodworking,
            volleyball, crossword puzzles, horse riding, juggling, archery, volunteering
        """),
    ),
    Group(  # health and home life
        lines("""
            What can I do about {}?
            What causes {}?
            Give me a simple home remedy for {}.
            When should I see a doctor because of {}?
            How can I prevent {}?
            Explain {} in one simple sentence.
            What should I tell a friend who suffers from {}?
        """),
        lines("""
            Last night I was kept awake by {}. What helps quickly?
            Are children more often troubled by {} than adults?
            Which bad habits make {} worse over time?
        """),
        items("""
            a headache, a cold, back pain, stress at work, dry skin, a sore throat, trouble falling asleep, hiccups, sunburn, tired eyes,
            a mosquito bite, motion sickness, low energy in the afternoon, stage fright, a nosebleed, a stiff neck, homesickness,
            bad posture, hay fever, a blister, an upset stomach, muscle cramps, chapped lips, a cough
        """),
    ),
    Group(  # lists
        lines("""
            List three {}.
            Name two popular {} and say why people like them.
            What are some good {} for a beginner?
            Which {} would you recommend, and why?
            Tell me about one of the best known {}.
            Make a short list of {} for a poster.
            Pick one of the many {} and describe it.
        """),
        lines("""
            For a quiz I need a handful of {}. What comes to mind?
            Of all {}, which one deserves to be known better?
            Put together a tiny guide to {} for my students.
        """),
        items("""
            musical instruments, board games, flowers for a balcony, holiday traditions, kinds of bread, winter sports, fruits with vitamin C,
            famous painters, European rivers, kinds of clouds, house plants, classic novels, healthy snacks, planets, dog breeds,
            inventions that changed the world, indoor games for children, mountain ranges, renewable energy sources, deserts,
            types of cheese, superstitions, folk dances, kinds of trees, famous bridges, summer drinks, ways to recycle paper, card games
        """),
    ),
    Group(  # greetings and small talk
        lines("""
            Hello! I am feeling {} today. How are you?
            Hi there, what would you say to someone who feels {}?
            Good morning! Please greet a group of people who feel {}.
            I feel {}. Tell me something nice.
            What music fits when I am {}?
            Suggest an activity for an evening when I feel {}.
            Is it normal to feel {} on a Monday?
            Write a friendly greeting for a guest who looks {}.
        """),
        lines("""
            Good evening! The weather made me rather {}. Let us chat a little.
            My colleague seems {} these days. How should I react?
            Give a toast at a table where all the guests are {}.
        """),
        items("""
            happy, tired, excited, a bit sad, bored, worried, relaxed, hungry, confused, full of energy, lost, hopeful, lucky, sleepy, angry,
            inspired, nostalgic, overwhelmed, curious about the world, disappointed, peaceful, restless, proud of my work, cold
        """),
    ),
    Group(  # stories
        lines("""
            Write the first sentence of a story about {}.
            Invent a name for {} and explain your choice.
            What would {} wish for?
            Write a two line poem about {}.
            Describe the home of {} in one sentence.
            What would {} say to a lost child?
            Think of a title for a book about {}.
            How does a story about {} end?
            Write a short dialogue between {} and a farmer.
        """),
        lines("""
            My niece loves tales with {}. Entertain her for a minute.
            What secret might {} be hiding from everyone else?
            Picture {} on a rainy bus ride and tell me what you see.
        """),
        items("""
            a young dragon, a forgetful wizard, a lonely robot, a talking tree, a brave mouse, an old sailor, a kind giant, a flying carpet,
            a clever thief, a sleepy bear, a princess who hates dancing, a mountain goat, a friendly ghost, a time traveler, a magic pencil,
            a singing river, a tired king, a boy with a kite, a lighthouse keeper, a snowman in summer, a fox detective, a tiny astronaut,
            a baker of moon cakes, a shy pirate, a dancing bear, a grumpy goblin, a runaway umbrella, a witch with hay fever
        """),
    ),
    Group(  # countries
        lines("""
            Which language is spoken in {}?
            Describe the landscape of {} in one sentence.
            Name a traditional dish from {}.
            What is the climate of {} like?
            Which animals can you find in {}?
            What is {} famous for?
            Name two big cities in {}.
            Tell me about a festival that is celebrated in {}.
            How do people greet each other in {}?
            Which sports are popular in {}?
        """),
        lines("""
            Our exchange student comes from {}. What could I ask about home?
            Which products does {} sell to the rest of the planet?
            Sum up {} for a travel quiz without naming it.
        """),
        items("""
            Japan, Brazil, Italy, Egypt, Canada, India, Norway, Mexico, Kenya, Greece, Australia, Spain, China, Turkey, Peru, Germany, Iceland,
            Thailand, Morocco, Portugal, Argentina, Poland, Vietnam, Switzerland, Ireland, Chile, Finland, Indonesia, South Korea, Austria
        """),
    ),
    Group(  # technology
        lines("""
            How does {} work?
            Explain {} to my grandfather.
            Who needs {}, and why?
            Name one advantage and one disadvantage of {}.
            How has {} changed the way we live?
            What did people do before {} was invented?
            Write a one sentence review of {}.
            What could {} look like in fifty years?
            How do I use {} safely?
        """),
        lines("""
            A museum for old things will show {} one day. Write the label.
            Does {} really make life simpler, or is it a burden?
            What broke first when you think about the usual faults of {}?
        """),
        items("""
            a washing machine, the internet, a mobile phone, an electric car, a solar panel, a wind turbine, an elevator, a refrigerator,
            a video call, a digital map, a search engine, a battery, a weather satellite, a microwave oven, a telescope, a printer,
            a robot vacuum, a smart watch, a web browser, a bar code scanner, a thermostat, a jet engine, an X-ray machine,
            a hearing aid, a radio, a password manager, a calculator, a pair of headphones
        """),
    ),
    Group(  # food and plants
        lines("""
            Is {} healthy? Answer in one or two sentences.
            How should I store {} at home?
            What can I cook with {}?
            How does {} grow?
            What does {} taste like?
            Write a short poem about {}.
            How can I tell that {} is fresh?
            Which dishes need {}?
        """),
        lines("""
            The market had far too much {} and I bought it all. Now what?
            Persuade a picky eater to give {} one more chance.
            In which season would a farmer bring in {}?
        """),
        items("""
            spinach, garlic, honey, rice, cabbage, pumpkin, basil, ginger, corn, broccoli, mint, celery, lettuce, asparagus, barley,
            cauliflower, parsley, wheat, watermelon, rhubarb, kale, cinnamon, pineapple, beetroot
        """),
    ),
)


def draw(rng: random.Random, count: int, test: bool, taken: set[str], everything: bool = False) -> list[str]:
    """`count` prompts that are not in `taken`, in turn from every group; they are added to `taken`.

    With `everything`, test subjects too go into the training templates.
    """
    pools = [_pool(rng, group, test, everything, taken) for group in GROUPS]
    prompts: list[str] = []
    while len(prompts) < count:
        before = len(prompts)
        for pool in pools:
            if pool and len(prompts) < count:
                prompts.append(pool.pop())
        if len(prompts) == before:
            raise ValueError(f"the templates give only {before} of {count} prompts")
    taken.update(prompts)
    rng.shuffle(prompts)
    return prompts


def _pool(rng: random.Random, group: Group, test: bool, everything: bool, taken: set[str]) -> list[str]:
    templates = group.test_templates if test else group.templates
    subjects = group.subjects if everything else group.test_subjects() if test else group.training_subjects()
    prompts = [template.format(subject) for template in templates for subject in subjects]
    prompts = [prompt[0].upper() + prompt[1:] for prompt in prompts]
    prompts = [prompt for prompt in prompts if prompt not in taken]
    rng.shuffle(prompts)
    return prompts
