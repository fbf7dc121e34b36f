"""Plain answers of our own to the templates of `instructions.py`, with the subject put for `{}`.

SmolLM2's answers are too few for a small model to learn from nothing how a sentence goes on; these are easy to learn, and give it the
habit of answering briefly and of taking up the subject that it was asked about.
"""

import instructions


def answers_to(template: str, subject: str) -> list[str]:
    answers = [answer.replace("{}", subject) for answer in ANSWERS[template]]
    return [answer[0].upper() + answer[1:] for answer in answers]


def pairs() -> list[tuple[str, str]]:
    """Every prompt of the training templates with each of its answers."""
    found = []
    for group in instructions.GROUPS:
        for template in group.templates:
            for subject in group.subjects:
                prompt = template.format(subject)
                found += [(prompt[0].upper() + prompt[1:], answer) for answer in answers_to(template, subject)]
    return found


TEXT = """
? Explain {} to a ten year old in two sentences.
Think of {} as a rule that nature always follows. You can see it at work all around you.
{} is something that happens in nature every day. Scientists watch it closely to learn how the world works.
? What is {} and why does it matter?
{} is a natural process that shapes the world around us. It matters because many other things depend on it.
? Give a short definition of {} in plain words.
In plain words, {} is what happens when nature moves energy or matter from one place to another.
? Write one sentence about {} for a museum sign.
Discover how {} shapes our planet and the life on it.
? Name an everyday example of {}.
A good example of {} can be seen in the kitchen or the garden on a warm day.
? Why do scientists study {}?
Scientists study {} because it helps them to understand how nature works and to make useful predictions.
? Can you tell me something surprising about {}?
It is surprising that {} was a mystery for a very long time, although people saw it every day.
? How does {} affect our daily life?
{} affects our daily life in many small ways, from the weather to the food that we eat.
? Summarize what we know about {} in one sentence.
We know that {} follows simple rules, and that it can be measured and explained.
? Suggest a simple home experiment that shows {}.
Take a glass of water and a lamp, watch what changes, and write down how {} shows itself.

? How do I make {} at home?
To make {} at home, start with fresh ingredients and cook them slowly over medium heat.
First gather all the ingredients for {}. Then mix them well and cook until they are done.
? List three ingredients that I need for {}.
For {} you need salt, a little oil, and the main ingredient, as fresh as you can get it.
? What can I serve together with {}?
You can serve {} with a green salad, fresh bread, or a cold drink.
? Give me one tip for better {}.
For better {}, take your time and taste it often while you cook.
? Describe the taste of {} in one sentence.
The taste of {} is warm and rich, with a gentle touch of spice.
? Where does {} come from, and who eats it today?
{} has a long history, and today people all over the world enjoy it.
? How can I make {} healthier?
To make {} healthier, use less salt and fat, and add more vegetables.
? How long does it take to prepare {}?
It takes about thirty minutes to prepare {}, and a little more if you are new to it.
? Write a short menu description for {}.
Our {}, made fresh every day with simple ingredients and served warm.
? What is a common mistake people make when cooking {}?
A common mistake is to cook {} too fast, so that it burns outside and stays raw inside.

? What should I see on my first day in {}?
On your first day in {}, walk through the old town and visit the main square.
? Name a famous landmark in {}.
A famous landmark in {} is the old building in the center of the city, which many people visit.
? When is the best time of the year to visit {}?
The best time to visit {} is in spring or autumn, when the weather is mild.
? Write a short postcard from {}.
Greetings from {}! The weather is lovely, the food is great, and I wish you were here.
? What kind of food is {} known for?
{} is known for its fresh local dishes, its sweet pastries, and its busy markets.
? Give me one safety tip for a trip to {}.
When you travel to {}, keep your money and your passport in a safe place.
? How do people usually get around in {}?
In {}, most people use buses and trains, and many like to walk or ride a bicycle.
? Describe a quiet morning in {}.
On a quiet morning in {}, the streets are empty and the first cafes open their doors.
? What should I pack for a week in {}?
For a week in {}, pack comfortable shoes, light clothes, and a jacket for the evening.
? Tell me one interesting fact about the history of {}.
The history of {} goes back many centuries, and some of its old buildings still stand today.

? Why was {} important in history?
{} was important because it changed how people lived, worked, and thought about the world.
? Give a one sentence summary of {}.
{} was a turning point that changed the lives of many people.
? Explain to a student how {} changed the world.
{} brought new ideas to many countries, and the world was not the same afterwards.
? Name one person who is connected with {}.
Many people took part in {}, and the names of its leaders are still known today.
? What happened during {}?
During {}, many things changed quickly, and people had to find a new way of life.
? List two results of {}.
Two results of {} were new ideas about society and a great change in trade.
? How did ordinary people experience {}?
For ordinary people, {} was a time of hope and of worry, and it changed their daily work.
? Write a headline that a newspaper could have used for {}.
The World Will Never Be the Same: All About {}.

? What do {} eat in the wild?
In the wild, {} eat what they can find near their home, such as plants or small animals.
? Tell me two facts about {}.
{} are well adapted to the place where they live, and they are more clever than many people think.
? Where do {} live?
{} live in many parts of the world, where they find enough food, water, and shelter.
? How do {} protect themselves from danger?
{} protect themselves by hiding, by moving quickly, or by staying close together.
? Write a short rhyme about {}.
I saw some {} on my way, they made me smile the whole long day.
? Why do many people like {}?
Many people like {} because they are beautiful and interesting to watch.
? Describe what {} look like to someone who has never seen them.
{} have a shape that you do not forget, and their color helps them in the place where they live.
? How do {} take care of their young?
{} keep their young warm and safe, and bring them food until they can live alone.
? How long do {} usually live?
{} can live for several years, and longer when they are well cared for.
? Are {} dangerous to humans?
Most of the time {} are not dangerous to humans, but it is wise to keep some distance.

? Give me three tips for {}.
Here are three tips for {}: start early, make a simple plan, and be patient with yourself.
? What is the first step when {}?
The first step when {} is to make a plan and to decide what you want to reach.
? Write a short encouraging note for someone who is {}.
I know that {} is not easy, but you are doing well. Keep going!
? What should I avoid when {}?
When {}, avoid rushing, and do not try to do everything at once.
? Why do people find {} difficult?
Many people find {} difficult because it takes time, practice, and patience.
? How can I save time when {}?
You can save time when {} by preparing everything before you start.
? Suggest a daily habit that helps with {}.
Spend ten minutes every morning on {}, and you will soon see a difference.
? How do I stay motivated while {}?
To stay motivated while {}, set small goals and enjoy every success.
? Which tools do I need for {}?
For {} you need only a few simple tools, a notebook, and some free time.
? Explain the benefits of {} in one sentence.
The benefits of {} are more confidence, new skills, and a feeling of success.

? What does {} do at work all day?
At work, {} solves problems, talks to people, and takes care of many small tasks.
? Name two skills that {} needs.
Two skills that {} needs are patience and good communication.
? How does someone become {}?
To become {}, you need training, practice, and a real interest in the work.
? Write one sentence that {} might say at work.
I love my work, even if the days are long, {} might say.
? What is the hardest part of being {}?
The hardest part of being {} is staying calm when there is a lot to do.
? Which subjects should I study to become {}?
To become {}, study math, language, and everything that is close to the work.
? Describe the workplace of {} in one sentence.
The workplace of {} is busy and well organized, with all the tools close at hand.
? What question would you ask {} in an interview?
I would ask {} what the best moment at work has been so far.
? Why do we need people who work as {}?
We need people who work as {} because they help others and keep our daily life going.

? Write a short message to {} to say thank you.
A message to {}: Thank you so much for your help. It means a lot to me.
? Write a polite email that asks {} for help.
An email to {}: Hello, I hope you are well. Could you please help me with a small problem?
? How do I apologize to {} for being late?
Tell {} that you are sorry for being late, and say that it will not happen again.
? Write a birthday wish for {} in one sentence.
For {}: Happy birthday, and may the new year bring you joy and good health!
? Suggest a small gift for {}.
A small gift for {} could be a good book, some flowers, or a box of chocolates.
? What is a kind way to say no to {}?
You can tell {} that you are thankful for the offer, but that you do not have the time.
? Write a short invitation to dinner for {}.
To {}: Please join us for dinner on Saturday evening. We would love to see you.
? How can I start a conversation with {}?
You can start a conversation with {} by asking a friendly question about the day.
? Write a get well soon message for {}.
To {}: Get well soon! I am thinking of you and hope that you feel better every day.

? What is {} used for?
People use {} to make daily life easier at home or on the way.
? How do I clean {}?
To clean {}, use a soft cloth, warm water, and a little soap, and let it dry.
? Write a short advertisement for {}.
Are you looking for {}? Ours is strong, simple, and made to last.
? What should I check before I buy {}?
Before you buy {}, check the quality, the size, and the price.
? Think of two unusual uses for {}.
You could use {} as a decoration in the living room, or as a prop in a play.
? How do I repair {} that is broken?
To repair {}, find the broken part first, and then fix it or buy a new one.
? Where is a good place to keep {} at home?
A good place to keep {} is a dry shelf or a closet that is easy to reach.
? Describe {} without saying its name.
It is a useful thing that most people have at home and use without thinking about it.
? How would you explain {} to a visitor from the past?
I would say that {} is a tool that makes a hard task simple.

? What is the difference between {}?
The main difference between {} is how they are used and how they feel.
? Compare {} in two sentences.
When you compare {}, you find that both have good sides. Which one is better depends on what you need.
? Name one thing that {} have in common.
One thing that {} have in common is that many people enjoy both.
? Which is better for a beginner, {}? The answer depends, so explain why.
It depends on your goals. When it comes to {}, a beginner should choose the simpler one.
? Help me choose between {}.
When you choose between {}, think about the cost, the time, and what you like best.
? How would you explain the difference between {} to a child?
I would tell the child to look closely at {}, and to name what is the same and what is not.

? Rewrite this sentence in a friendlier tone: {}
Here is a friendlier version: {} Thank you so much!
? Make this sentence shorter: {}
A shorter version is possible, but the main point is this: {}
? Rewrite this sentence as a question: {}
Here is a way to ask it: Is it true? {}
? Put this sentence into more formal words: {}
In more formal words: Please note the following. {}
? Rewrite this sentence in the past tense: {}
In the past tense, it begins like this: Yesterday it was so. {}
? Continue this story with one more sentence: {}
{} Then something happened that nobody had expected.

? What does the word "{}" mean?
The word "{}" describes how a person feels or behaves toward others.
? Use the word "{}" in a sentence.
My sister is always {} when she meets new people.
? Give me two synonyms for "{}".
There are several words that are close to "{}", and a good dictionary lists them.
? What is the opposite of "{}"?
The opposite of "{}" is the word "not {}", or a word that means the same.
? Write a short poem about being {}.
To be {} is to be me, like a wind above the sea.
? Describe a person who is {}.
A person who is {} shows it in the way they speak and act every day.
? When is it good to be {}?
It is good to be {} when other people need it and when the moment is right.
? Name a famous character who is {}.
Many famous characters in books and films are {}, and readers like them for it.

? Why is {} good for you?
{} is good for you because it keeps your body and your mind active.
? What do I need to get started with {}?
To get started with {}, you need a little time, simple equipment, and a good teacher.
? Explain the basic rules or ideas of {}.
The basic idea of {} is simple: start slowly, follow the rules, and enjoy yourself.
? Who would enjoy {} the most?
People who like to learn something new would enjoy {} the most.
? How can I become better at {}?
To become better at {}, practice a little every day and learn from your mistakes.
? Write a slogan for a club about {}.
Join our club for {} and find new friends!
? How often should a beginner practice {}?
A beginner should practice {} two or three times a week.
? What are the risks of {}?
The risks of {} are small if you are careful and know your limits.
? Recommend a good place for {}.
A good place for {} is quiet, safe, and easy to reach from home.
? Describe {} in three words.
{} is fun, relaxing, and rewarding.

? What can I do about {}?
If you have {}, rest, drink enough water, and be patient with yourself.
? What causes {}?
The cause of {} is often a lack of rest, the weather, or too much stress.
? Give me a simple home remedy for {}.
A simple home remedy for {} is a warm cup of tea and a good rest.
? When should I see a doctor because of {}?
You should see a doctor about {} if it lasts for more than a few days.
? How can I prevent {}?
You can prevent {} by sleeping enough, eating well, and taking breaks.
? Explain {} in one simple sentence.
{} is a sign that your body or your mind needs some care.
? What should I tell a friend who suffers from {}?
Tell your friend that {} will pass, and offer your help.

? List three {}.
There are many {}, so choose three that you know well and like the most.
? Name two popular {} and say why people like them.
Among the {}, people like those that are beautiful and easy to enjoy.
? What are some good {} for a beginner?
Good {} for a beginner are the ones that are simple and well known.
? Which {} would you recommend, and why?
I would recommend the {} that are well known, because it is easy to learn about them.
? Tell me about one of the best known {}.
The best known of all {} has a long history, and people still talk about it today.
? Make a short list of {} for a poster.
For the poster on {}, choose three short names and draw a picture for each.
? Pick one of the many {} and describe it.
It is hard to pick one of the many {}, but my favorite is colorful and full of life.

? Hello! I am feeling {} today. How are you?
Hello! I am fine, thank you. It is all right to feel {}. What made you feel that way?
? Hi there, what would you say to someone who feels {}?
I would say that it is all right to feel {}, and that I am here to listen.
? Good morning! Please greet a group of people who feel {}.
Good morning, everyone! I know that you feel {}, and I am glad that you are here.
? I feel {}. Tell me something nice.
It is good that you tell me you feel {}. You are doing well, and the day is still young.
? What music fits when I am {}?
When you are {}, calm music with a soft melody is a good choice.
? Suggest an activity for an evening when I feel {}.
When you feel {} in the evening, take a walk or call a good friend.
? Is it normal to feel {} on a Monday?
Yes, it is normal to feel {} on a Monday. Many people feel the same.
? Write a friendly greeting for a guest who looks {}.
Welcome! You look {}, so please come in and sit down.

? Write the first sentence of a story about {}.
Once upon a time there was {}, and nobody knew what was going to happen.
? Invent a name for {} and explain your choice.
I would choose the name Pip for {}, because it is short and friendly.
? What would {} wish for?
The wish of {} would be a good friend and a warm place to stay.
? Write a two line poem about {}.
Here comes {} along the way, with a song to sing on a sunny day.
? Describe the home of {} in one sentence.
The home of {} is small and cozy, with a round door and a view of the hills.
? What would {} say to a lost child?
Do not be afraid, {} would say, I will help you to find the way home.
? Think of a title for a book about {}.
A good title would be: The Long Journey of {}.
? How does a story about {} end?
In the end, the story of {} has a happy turn, and everyone goes home in peace.
? Write a short dialogue between {} and a farmer.
Good morning, said the farmer. Good morning, answered {}, may I rest here for a while?

? Which language is spoken in {}?
The people in {} speak the language of the country, and many also learn English at school.
? Describe the landscape of {} in one sentence.
The landscape of {} is full of contrasts, with hills, rivers, and wide open land.
? Name a traditional dish from {}.
A traditional dish from {} is made with local vegetables, meat or fish, and spices.
? What is the climate of {} like?
The climate of {} changes with the seasons and is different from region to region.
? Which animals can you find in {}?
In {} you can find many birds, wild animals in the forests, and fish in the rivers.
? What is {} famous for?
{} is famous for its culture, its food, and its beautiful nature.
? Name two big cities in {}.
The big cities in {} are busy places, and the capital is the best known of them.
? Tell me about a festival that is celebrated in {}.
In {} people celebrate a festival with music, dancing, and good food.
? How do people greet each other in {}?
In {} people greet each other with a smile and a friendly word.
? Which sports are popular in {}?
In {} soccer is popular, and many people also like running and swimming.

? How does {} work?
The way {} works is simple: energy goes in, and useful work comes out.
? Explain {} to my grandfather.
You can think of {} as a helpful machine that does a task for you.
? Who needs {}, and why?
Many people need {} because it saves time and makes life easier.
? Name one advantage and one disadvantage of {}.
An advantage of {} is that it saves time. A disadvantage is that it can be expensive.
? How has {} changed the way we live?
Thanks to {}, many things are faster and easier than they were before.
? What did people do before {} was invented?
Before {} was invented, people did the same work by hand, and it took much longer.
? Write a one sentence review of {}.
I am happy with {}, because it is easy to use and works well every day.
? What could {} look like in fifty years?
In fifty years {} could be smaller, faster, and much more clever.
? How do I use {} safely?
To use {} safely, read the instructions first and keep it away from water.

? Is {} healthy? Answer in one or two sentences.
Yes, {} is healthy when you eat it in normal amounts. It is part of a good diet.
? How should I store {} at home?
Store {} in a cool and dry place, and use it within a few days.
? What can I cook with {}?
With {} you can cook a soup, a salad, or a simple dish for the whole family.
? How does {} grow?
The plant that gives us {} needs good soil, enough water, and a lot of sun.
? What does {} taste like?
{} has a fresh and mild taste that goes well with many dishes.
? Write a short poem about {}.
Oh {}, fresh and bright, you make my dinner taste just right.
? How can I tell that {} is fresh?
You can tell that {} is fresh by its bright color and its good smell.
? Which dishes need {}?
Many soups, salads, and sweet dishes need {} for a good taste.
"""


def _read() -> dict[str, tuple[str, ...]]:
    blocks = [block.strip().splitlines() for block in TEXT.replace("\n\n", "\n").strip().removeprefix("? ").split("\n? ")]
    found = {block[0]: tuple(block[1:]) for block in blocks}
    asked = {template for group in instructions.GROUPS for template in group.templates}
    if found.keys() != asked or not all(found.values()):
        raise ValueError(f"templates without answers or answers without templates: {sorted(found.keys() ^ asked)}")
    return found


ANSWERS = _read()
