"""Scenario of the demo: kinds of requests, their preferred strategies and helpful memories, and templates.

An assistant of a small software company. Each kind of request has one preferred strategy and two or three
helpful memories. Some memories share the request's words and do not help; some help and share none of its
words, so that text similarity cannot find them. The system has no access to this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of request."""

    name: str
    strategy: str
    """The preferred strategy, of the generic set."""
    helpful: tuple[str, ...]
    """Keys of the helpful memories in `MEMORIES`."""
    topic: tuple[str, ...]
    """Noun phrases for replies: "no, I meant the …"."""
    templates: tuple[str, ...]


MEMORIES: Mapping[str, str] = {
    # Each of these helps with one kind of request; nearly half share hardly any word with it.
    "blue-green": "Releases go out blue-green: traffic moves to the new colour only after its checks pass.",
    "freeze": "Maya keeps the freeze calendar; nothing ships on the last two working days of a month.",
    "migrations": "Schema migrations run as a separate job before the new containers start.",
    "pool-cap": "The connection pool is capped at 40 and fills up while the nightly export runs.",
    "idle-timeout": "The load balancer's idle timeout went from 300 s to 60 s in the March upgrade.",
    "flame": "The flame graphs of every hour are kept for ninety days in the profiler.",
    "inventory": "The service inventory lists owner, port, runtime and on-call for each component.",
    "env-file": "Defaults live in defaults.toml; the environment overrides them one variable at a time.",
    "last-ticket": "This person's previous ticket was about single sign-on from the mobile app.",
    "two-products": "Half of all tickets that name no product turn out to be about the old desktop client.",
    "browser": "Reports without a browser and an account name took three times as long to resolve.",
    "transcripts": "Meetings are transcribed automatically; the transcripts sit beside the calendar entry.",
    "attention-span": "Readers on this team open things on a phone, between two trains.",
    "decisions": "Decisions are marked with a star in the notes, everything else is discussion.",
    "tone": "The house voice is dry and warm; puns are welcome, superlatives are not.",
    "trademarks": "Legal rejected three titles last year because another firm had registered them.",
    "lighthouse": "The founders met repairing a lighthouse, and sailors' words run through everything.",
    "refund-limit": "Support may give back up to 200 euros without asking anyone.",
    "double-capture": "Cards were captured twice on 4 and 5 May by a retry in the payment gateway.",
    "churn": "People who got a named contact within an hour stayed twice as often.",
    "rfc": "Every purchase over 10,000 euros needs a written comparison with exit costs.",
    "team-size": "Three engineers share the pager, and none of them wants to run another cluster.",
    "bench-2024": "Measurements of throughput and tail latency on our own traffic are in the lab folder.",
    "bootstrap": "The bootstrap script installs the toolchain and the git hooks on a clean machine.",
    "proxy": "Inside the office network downloads need the proxy certificate.",
    "arm": "Images for Apple silicon are built under the suffix -arm64.",
    "handbook": "Section 7 of the handbook states days, notice and carry-over for each country.",
    "works-council": "Since January the works council has agreed to five extra days for carers.",
    # These share words with requests, but do not help.
    "deploy-joke": "The word deploy was banned from stand-up for a week after somebody made a song of it.",
    "slow-lunch": "The canteen is slow on Thursdays; somebody should look into the cause.",
    "port-wine": "The service desk got a bottle of port and a card for answering by default.",
    "broken-chair": "The broken chair in the corner does not work as a seat, please do something about it.",
    "meeting-room": "The meeting room named Summary can be booked for the weekly and for reviews.",
    "name-tags": "Name tags for the launch campaign's landing page event are in the drawer.",
    "charged-bikes": "Bikes are charged twice a week; an invoice for the socket came last month.",
    "vendor-lunch": "The database vendor paid for lunch; the message queue at the door was long.",
    "laptop-bags": "Laptop bags for Linux and Mac users: set them up on the shelf by the printer.",
    "holiday-party": "The holiday party has a policy: leave your days of worry at home.",
}
"""id → text. Every request has all of them as candidates."""

KINDS: tuple[Kind, ...] = (
    Kind(
        "deploy",
        "step_by_step",
        ("blue-green", "freeze", "migrations"),
        ("the deployment to {env}", "the release of {service}", "rolling out {service}"),
        (
            "How do I deploy {service} to {env}?",
            "What's the way to get {service} out to {env} {when}?",
            "I have to roll out {service} {when}, how does that go?",
            "Walk me through releasing {service}",
            "{service} needs to be on {env} {when}. What do I do?",
            "First time I ship {service}, how is it done?",
            "How does one push a hotfix of {service} to {env}?",
            "My change to {service} is merged, how does it reach {env}?",
            "I want to promote {service} from staging to {env}",
            "How can I roll {service} back on {env} if it goes wrong?",
        ),
    ),
    Kind(
        "slowness",
        "deep_research",
        ("pool-cap", "idle-timeout", "flame"),
        ("why {service} is slow", "the latency of {service}", "the timeouts"),
        (
            "Why has {service} been so slow {since}?",
            "{service} times out for {customer} {since}, what is the cause?",
            "p99 of {service} doubled {since} and nobody knows why",
            "Find out why {service} falls over every night",
            "What is behind the latency spikes in {service} {since}?",
            "Requests to {service} hang for a minute, then fail. Where does that come from?",
            "We see gateway errors from {service} {since}. Root cause?",
            "{customer} complains that {service} crawls. What's really going on?",
            "Throughput of {service} dropped by {percent} {since}, please look into the reasons",
            "Something degrades {service} {since}, I need the actual reason",
        ),
    ),
    Kind(
        "lookup",
        "quick_answer",
        ("inventory", "env-file"),
        ("the port of {service}", "the default of {setting}", "who owns {service}"),
        (
            "Which port does {service} listen on?",
            "What's the default for {setting} in {service}?",
            "Who owns {service}?",
            "Who is on call for {service} {when}?",
            "What version of {runtime} does {service} run?",
            "Is {setting} on or off by default in {service}?",
            "Quick one: where is {setting} set for {service}?",
            "What was the name of the variable for {setting} again?",
            "{service}: which {runtime} version?",
            "Which team runs {service} these days?",
        ),
    ),
    Kind(
        "vague",
        "clarify_first",
        ("last-ticket", "two-products", "browser"),
        ("the other problem", "the thing on my phone", "the login screen"),
        (
            "It doesn't work",
            "{thing} is broken {when_vague}",
            "I can't get in {when_vague}",
            "There's a problem with {thing}",
            "Help, {thing} does nothing",
            "{thing} looks wrong {since}",
            "That error is back",
            "{thing} won't load",
            "Same issue as before with {thing}",
            "Something's off with {thing} {since}",
            "My {thing_bare} is gone",
            "{thing} acts up again, can you fix it?",
        ),
    ),
    Kind(
        "digest",
        "summarize",
        ("transcripts", "attention-span", "decisions"),
        ("the {meeting}", "what was decided in the {meeting}", "the short version"),
        (
            "What did I miss in the {meeting}?",
            "Give me the gist of the {meeting}",
            "I was out {when_past}, what happened in the {meeting}?",
            "Can you boil the {document} down for me?",
            "What came out of the {meeting} {when_past}?",
            "The {document} has {pages} pages, what does it say?",
            "Key points of the {document}",
            "Catch me up on the {meeting}, I have {minutes} minutes",
            "tl;dr of the {document}?",
            "I need the essentials of the {meeting} before I talk to {customer}",
        ),
    ),
    Kind(
        "naming",
        "creative",
        ("tone", "trademarks", "lighthouse"),
        ("a name for {product}", "the tagline", "something bolder"),
        (
            "We need a name for {product}",
            "Come up with a tagline for {product}",
            "How could we announce {product} without being boring?",
            "Ideas for a launch campaign for {product}?",
            "What might we call {product}?",
            "I'm stuck on a headline for {product}, got anything?",
            "Think of a fun opening line for the page about {product}",
            "Write a slogan for {product} that {audience} would remember",
            "Suggest a theme for the party when {product} ships",
            "How would you pitch {product} to {audience} in one sentence?",
        ),
    ),
    Kind(
        "billing",
        "empathize",
        ("refund-limit", "double-capture", "churn"),
        ("the money you took", "the second charge", "the invoice of {month}"),
        (
            "I've been charged twice for {month} and nobody answers me",
            "Third time I write about the wrong invoice for {month}. I'm fed up",
            "You took {amount} from my card without asking!",
            "My account was closed although I paid {amount}, this is a nightmare",
            "I want my {amount} back, I've been waiting {waiting}",
            "The bill for {month} is a shock, I really can't afford {amount}",
            "Honestly I'm close to cancelling, the {month} invoice is wrong again",
            "Why do I have to beg for a refund of {amount} for {waiting}?",
            "I trusted you and now {amount} are missing from my account",
            "Your reminder for {month} embarrassed me in front of my boss, I had paid",
        ),
    ),
    Kind(
        "vendors",
        "deep_research",
        ("rfc", "team-size", "bench-2024"),
        ("{vendor} against {vendor}", "what {vendor} would cost us", "the comparison"),
        (
            "Should we take {vendor} or {vendor} for {job}?",
            "How does {vendor} compare with {vendor} for {job}?",
            "What speaks against moving {job} to {vendor}?",
            "I must recommend something for {job} by {deadline}, is {vendor} any good?",
            "Is {vendor} worth the money for {job}?",
            "What are the risks of betting on {vendor} for {job}?",
            "Which managed offering fits {job} best, {vendor} or {vendor}?",
            "What do people who left {vendor} say about it?",
            "Would {vendor} cope with {job} at our volume?",
            "Total cost of {vendor} over three years for {job}?",
        ),
    ),
    Kind(
        "setup",
        "step_by_step",
        ("bootstrap", "proxy", "arm"),
        ("setting up {tool}", "my {machine}", "the install of {tool}"),
        (
            "How do I set up {tool} on my {machine}?",
            "I got a new {machine}, how do I get {tool} running?",
            "Installing {tool} on a {machine} fails halfway, what's the right order?",
            "Day one here: how do I get a working {tool} on the {machine}?",
            "Getting {tool} to run locally on my {machine}, how?",
            "How can I run {service} on my own {machine}?",
            "What do I need before {tool} starts on a {machine}?",
            "Please help me configure {tool} for the {machine}",
            "My {machine} was wiped, how do I rebuild the {tool} environment?",
            "How do I connect {tool} on the {machine} to {service}?",
        ),
    ),
    Kind(
        "leave",
        "quick_answer",
        ("handbook", "works-council"),
        ("{leave} leave", "how many days", "the rule for {country}"),
        (
            "How many days of {leave} leave do I get in {country}?",
            "Can I carry {leave} leave over into {month}?",
            "How much notice for {leave} leave?",
            "Is {leave} leave paid in {country}?",
            "When does my {leave} leave expire?",
            "Do part-timers in {country} get {leave} leave?",
            "Who signs off {leave} leave {when}?",
            "Does {leave} leave count during probation?",
            "What's the limit for {leave} leave this year?",
            "May I take {leave} leave in half days in {country}?",
        ),
    ),
)

# fmt: off
SLOTS: Mapping[str, tuple[str, ...]] = {
    "service": (
        "the checkout service", "payments-api", "the search indexer", "the mobile gateway", "auth",
        "ledger", "the notification worker", "the report generator", "inventory-sync", "the web shop",
        "catalogue", "the image resizer", "the pricing engine",
    ),
    "env": ("production", "prod", "the EU cluster", "the canary pool", "the US region", "the demo site"),
    "when": (
        "today", "tomorrow", "tonight", "this week", "on Friday", "before noon", "next Monday", "right now",
    ),
    "when_vague": ("again", "since this morning", "for me", "today", "on my side", "all of a sudden"),
    "when_past": ("yesterday", "last week", "on Tuesday", "this morning", "on Friday"),
    "since": (
        "since Monday", "since the upgrade", "since last night", "for two days", "since March", "all week",
        "after lunch", "since the move",
    ),
    "customer": (
        "Northwind", "the Danish bank", "our biggest client", "Okafor Ltd", "the hospital", "a partner",
    ),
    "percent": ("a third", "20 %", "half", "forty percent", "15%"),
    "setting": (
        "the retry limit", "request logging", "the session lifetime", "rate limiting", "the upload limit",
        "two-factor login", "the cache size", "compression",
    ),
    "runtime": ("Python", "Node", "Java", "Postgres", "Redis", "Go"),
    "thing": (
        "the app", "the page", "my screen", "the export", "it", "the button", "the dashboard", "the sync",
        "the thing from yesterday", "the form", "the list",
    ),
    "thing_bare": ("account", "draft", "list", "menu", "picture", "old view"),
    "meeting": (
        "planning meeting", "all-hands", "steering committee", "sprint review", "board call", "retro",
        "customer workshop", "architecture round", "kick-off",
    ),
    "document": (
        "incident report", "audit", "quarterly report", "design proposal", "contract draft",
        "survey results", "long thread about pricing", "migration plan",
    ),
    "pages": ("40", "sixty", "120", "about ninety", "23"),
    "minutes": ("five", "two", "ten", "3"),
    "product": (
        "the new dashboard", "our budgeting app", "the smart thermostat", "the loyalty card", "our podcast",
        "the internal chatbot", "the beta programme", "the spring release", "our parcel locker",
        "the open-source tool",
    ),
    "audience": (
        "nurses", "teenagers", "shop owners", "developers", "busy parents", "accountants", "students",
    ),
    "month": ("January", "February", "March", "April", "May", "June", "last month", "September", "October"),
    "amount": (
        "49 euros", "$120", "£75", "300 euros", "my deposit", "1,200 dollars", "19.99",
        "a whole month's rent",
    ),
    "waiting": ("two weeks", "a month", "since Easter", "ten days", "forever", "six weeks"),
    "vendor": (
        "Snowflake", "BigQuery", "Postgres", "MongoDB", "Datadog", "Grafana Cloud", "Confluent", "RabbitMQ",
        "Elastic", "OpenSearch", "Stripe", "Adyen",
    ),
    "job": (
        "analytics", "the event bus", "full-text search", "card payments", "observability",
        "the data warehouse", "session storage", "log retention",
    ),
    "deadline": ("Friday", "the end of the month", "Thursday noon", "the next board call", "tomorrow"),
    "tool": (
        "Docker", "the dev container", "the test database", "the CLI", "the VPN client", "pre-commit",
        "Poetry", "the local Kafka", "the debugger", "the design system",
    ),
    "machine": ("laptop", "MacBook", "Linux box", "Windows PC", "M3 Mac", "workstation", "ThinkPad"),
    "leave": ("parental", "sick", "annual", "unpaid", "study", "carer's", "bereavement", "compensatory"),
    "country": ("Germany", "France", "the UK", "Poland", "Spain", "the Netherlands", "Ireland"),
}
"""Values of {slot} in requests, topics and replies."""

OPENERS: tuple[str, ...] = (
    "", "", "", "", "", "Hi, ", "Hello! ", "Hey, ", "Quick question: ", "Morning. ",
    "Sorry to bother you. ", "One more thing: ", "Me again. ", "Hi there, ", "So, ", "OK, ",
    "Good afternoon, ", "Hey team, ", "Not sure where to ask this. ", "Next: ",
)
CLOSERS: tuple[str, ...] = (
    "", "", "", "", "", "", " Thanks!", " Thank you", " Please.", " Cheers", " It's for a colleague.",
    " I'm in a hurry.", " Any help is welcome.", " Thanks in advance", " pls", " asking for the whole team",
    " No rush.",
)
# fmt: on
