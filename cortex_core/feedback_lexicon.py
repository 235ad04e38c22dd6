"""English phrases that say how an answer was taken. Data alone: `feedback_patterns` says how they are read.

Notation: `;` or a new line ends a phrase; `(a|b|)` is a choice, where nothing may be a choice too. Words are
as the tokenizer gives them: lower case, contractions opened ("isn't" is "is not").
"""

from __future__ import annotations

PRAISE = """
perfect; perfectly; awesome; amazing; excellent; fantastic; wonderful; brilliant; superb; fabulous; terrific
outstanding; phenomenal; marvelous; splendid; flawless; flawlessly; impeccable; incredible; delightful
stellar; magnificent; lovely; great; impressive; impressed; helpful; useful; informative; insightful
beautiful; beautifully; neat; sweet; nice; nicely; dope; epic; cool; thorough; elegant; concise; handy
ideal; correct; accurate; satisfied; pleased; delighted; thrilled; happy; glad; grateful
good (job|work|answer|idea|point|call|catch|explanation|one|stuff|advice|suggestion|suggestions|solution|
enough|to know|bot|response|find|thinking)
(very|really|so|pretty|quite|super|damn|too|all|that|this|is|are|was|looks|look|looking|sounds|sound|seems|
works|feels|reads) good
(is|was|looks|sounds|seems|works|reads|feels) (really|very|so|pretty|quite|all|super|) (fine|okay|ok|
alright); (is|was|are|were|got it|get it|got that|all|exactly|totally|absolutely) right; right answer
right on; right (track|direction); (much|way|far|so much|lot|even|is|looks|reads|works|feels|sounds) better
better now; better than (i|expected)
(is|much|lot|far|way|so much) (clearer|cleaner|faster|easier|nicer|simpler)
(is|was|very|super|crystal|really|so|all|pretty|quite) clear; clear (now|explanation|answer)
well (done|explained|written|put|played|said); works; worked; (is|are|now|finally|all|seems to be) working
working (now|again|fine|perfectly|great|well|nicely|like a charm)
makes (a lot of|perfect|total|complete|much more|more|) sense; made sense; spot on; bang on; on point
on the money; dead on; best (answer|explanation|one|response|bot|assistant|help|advice|thing|yet|so far)
thumbs up; top notch; first class; first rate
(love|loved|loving|like|liked|adore|enjoyed) (it|this|that|how|the|your|both|all|these|those|them|what)
"""
"""Says something good of its subject, unless negated, asked, wished for or said of what is requested."""

SUCCESS = """
(that|it|this|everything|all|now|fix|code|solution|link|command|yes) (now|just|actually|finally|really|
totally|) works
works (now|for me|great|fine|well|perfectly|like a charm|nicely|beautifully|wonders|as expected|flawlessly|
a treat|again)
(that|it|this|they|one|fix|code|solution|trick|command|and|finally|totally|yes|hey|yep) (just|actually|
finally|totally|) worked
worked (now|for me|great|fine|well|perfectly|like a charm|nicely|beautifully|wonders|as expected|like magic|
a treat|first); (that|this|it) (did|does) (it|the trick|the job); did the trick; does the trick
(that|it|this) (really|) helped; helped a (lot|bunch|ton)
(problem|issue|bug|error|case|mystery|it is|that is|is|now|all) (is|was|has been|) (solved|fixed|sorted|
resolved); (solved|fixed|resolved|cleared|sorted|cured) (it|that|this|the|my|everything|both|all)
(that|this|it|which|one) (will|would|should) do (nicely|it|the trick|fine|just fine|perfectly|)
(that|this|it) (will|would) (help|work)
(that|this|which) will be (great|perfect|fine|good|lovely|wonderful)
i am (all set|all good|good to go|sorted); all set; all good; good to go
(exactly|just|precisely) (what|the thing|the one|the answer|the info|the information|as|how|like) (i|
we) (was|were|wanted|needed|asked|meant|had|hoped|looking|expected|am)
(is|was) (exactly|precisely|just|all|everything) i (wanted|needed|asked for|was looking for|was after|meant|
had in mind|hoped for)
what i (was looking for|needed|wanted|was after|was hoping for|had in mind|asked for)
(this|that) is the one; that is it; that is what i (meant|wanted|needed)
(nailed|aced|crushed) (it|that|this)
you (rock|rule|nailed it|are the best|are right|are awesome|are amazing|are correct|are great)
you are (a|an) (genius|legend|star|hero|lifesaver|life saver|angel|gem|wizard|champ|champion|godsend)
you saved (me|my|us); you made my day; life saver; lifesaver
saved (me|my|us) (a lot|hours|so|day|life|bacon|time|a ton|the); made my day
sounds (good|great|perfect|wonderful|lovely|like a plan|fine|fantastic|excellent|amazing|right|ideal|nice|
awesome); (got|get) it (to work|working|running); got it (now|thanks|thank)
(now|ah|oh|okay|ok|yes|finally) i (see|get it|understand|got it); i (get|understand) it now
(passes|pass|passed|passing|green|compiles|runs|builds|loads|boots|compiling|running) now
(all|everything|tests|build|suite|ci) (is|are|) (green|passing|passes|pass|passed)
it (runs|loads|builds|compiles|starts|renders|deploys|boots|prints|opens|installs|connects|matches) (now|
fine|again|correctly|perfectly|properly|great|clean|cleanly|without)
(can not|could not) (be|have been) (better|happier|more helpful|clearer|easier|more pleased)
could not have (said|done|put|asked|written) (it|this|that|for) (better|more|it better|a better)
can not (thank you enough|complain|fault); no complaints
(no|not) (more|any more|any|) (error|errors|issues|crashes|warnings|complaints|bugs) (now|anymore|any more|
so far|at all|here|since|whatsoever)
(no longer|stopped) (crashes|crashing|fails|failing|broken|hangs|hanging|freezing|happening|erroring|
complaining); (would|will|highly) (highly|definitely|) recommend (this|it|you|to); hats off; chef kiss
kudos; bravo; bingo; eureka; hooray; hurray; yay; woohoo; woo; yess; huzzah; two thumbs up; five stars
5 stars; world class; next level; mind blown; blew my mind; blown away; gold star; keep it up
keep up the (good|great); as promised; like magic; like a charm; right up my alley
(that|this|it|you) answered (my|the|all|it|everything); answers my question; answered my question
(cleared|clears) (it|that|things|everything|this) (all|right|) up; clears up
(learned|learnt) (a lot|so much); (than|beyond|above) (i|my) (expected|expectations|hoped|asked)
exceeded my; better than expected
(i|we) will take (it|that|that one|this one|this|the first|the second|them)
let us (go with|do|book) (that|it|this)
"""
"""Success, relief or agreement in a phrase of its own; the ways to negate it stand in the other lists."""

THANKS = """
thanks; thank you; thank u; thankyou; thank ya; many thanks; cheers; much appreciated
(really|i|so|greatly|truly) appreciate (it|that|this|the|your|you|all); appreciated; much obliged; bless you
thanks a (lot|bunch|million|ton)
"""
"""Courtesy: praise when it stands alone, politeness beside a complaint or after a request."""

CLOSING = """
(that|this) is (all|everything|about it|pretty much it|about all); that will be (all|it); will be all
that would be all; nothing (else|more|further); no (more|further|other) questions
i am (done|all set|good for now|finished|good thanks|good thank)
(no|nope|nah) (that|this|it) is (all|it|everything|good|fine|great|perfect|okay|correct|right|enough)
(no|nope) (thanks|thank you) (that|this|i) (is|am) (all|it|everything|good|fine|done); good bye; goodbye
bye; bye bye; see ya; see you; take care
have a (good|great|nice|lovely|wonderful|blessed|fantastic) (day|night|one|evening|weekend|afternoon|rest|
time)
"""
"""The user is finished. Content, unless something else in the reply says otherwise."""

CRITICISM = """
wrong; incorrect; inaccurate; false; untrue; nonsense; gibberish; garbage; rubbish; trash; crap; crappy
bullshit; terrible; horrible; awful; useless; worthless; pointless; unhelpful; unusable; worse; worst; bad
poor; poorly; pathetic; lousy; lame; stupid; dumb; idiotic; idiot; ridiculous; absurd; disappointing
disappointed; disappointment; dissatisfied; unsatisfied; unhappy; frustrated; frustrating; frustration
annoying; annoyed; irritating; infuriating; disgusting; unacceptable; outrageous; misleading; outdated
obsolete; mistaken; invalid; atrocious; hallucinated; hallucinating; hallucination; hallucinations; clueless
incompetent; incoherent; inconsistent; irrelevant; unrelated; incomplete
(hate|hated) (it|this|that|how|the|you|your|when); sucks; sucked; suck; shit; shitty; wtf; ffs; smh; ugh
argh; meh; yuck; ew; dreadful; fail; failed; failure; mess; messy; bogus; broken; buggy
made (that|it|this|things|stuff) up; making (that|it|this|things|stuff) up
(too|so|very|really|is|was|overly|way too|far too) (long|vague|generic|complicated|verbose|short|slow|wordy|
technical|expensive|basic|shallow|boring|repetitive|far|formal|pricey|robotic)
waste of (time|my time|money|tokens|breath); wasted (my|an|hours|half|all|the|so); wasting (my|time)
(no|not of any|not much|zero|little) (help|use|good); no better; nonsensical; all over the place; lied; liar
lies; contradicts (itself|yourself|what|the|your); contradicting yourself; joke of; what a joke; is a joke
one job
"""
"""Says something bad of its subject, unless negated, asked, or said of what is requested."""

COMPLAINT = """
(is|are|was|were|does|do|did|has|have|still) not (really|even|actually|at all|) (work|working|help|helping|
helpful|useful|correct|right|true|accurate|good enough|run|compile|load|open|solve|fix)
does not (make sense|make any sense|exist|answer|address|look right|sound right|seem right|match|fit|apply|
add up|solve|fix|change|seem|cover|show|return|do|print|load|run|start|install|build|connect|respond|render|
update|save|sync|pass|validate|parse)
did not (work|help|answer|fix|solve|change|do|make|address|read|listen|understand|include|follow|get|look|
even|run|compile|load|match|save|use|go through|arrive|find|mention|check|cover|send|show|return)
do not (like|love) (it|this|that|the|how|any|your|them); do not think (that|this) is; do not agree
do not believe (you|that|this|it); (makes|make|made) (no|zero|little) sense
not (making|make|made) (any|)sense; still can not
can not (log in|login|open|find it|find that|access|reproduce|connect|install|import|click|load|reach|
download|even) (it|this|that|the|my|); (get|see|run|use) (it|that|this) to work
(can not|could not) get (it|this|that) to
(never|hardly|barely|rarely) (worked|works|helped|arrived|answers|answered|listens|loads|helps|shows|ran|
loaded|came)
nothing (works|worked|happens|happened|changed|changes|loads|shows|helps|is working|is happening|useful|
came|appears|comes)
none of (this|that|these|those|them|it|the|your) (suggestions|links|answers|options|steps|) (is|are|was|
were|work|works|worked|help|helps|helped|make|makes|exist|exists|apply|match)
not (even close|remotely|a fan|impressed|amused|happy|satisfied|pleased|convinced|sold|there yet|ideal|
so much|enough|useful|acceptable|funny|good|great|cool|okay|ok|worth|a good|much help|nice|fair|true|
accurate|helpful|correct|right)
not (very|really|so|too|particularly|that|all that|exactly|especially) (helpful|good|useful|clear|nice|
impressive|impressed|happy|great|accurate|correct|satisfied)
(far from|nowhere near|anything but|less than) (right|perfect|correct|ideal|good|accurate|helpful|done|true|
clear|useful|satisfied|impressed|great|thrilled); way off; off (base|topic|the mark)
missed the (point|mark); missing the point; missed my point; beside the point; besides the point; miles off
leaves (a lot|much) to be desired; could (be|have been|do) (a lot|much|way|) better
(would|should) have been (nice|better|nicer|great|easier|faster|helpful|good)
thanks for (nothing|wasting|the useless); thank you for (nothing|wasting); thanks but no thanks
(thanks|thank you) (anyway|anyways|for trying); nice try; good try; nice attempt; close but no; do better
for effort
still (fail|fails|failing|failed|crash|crashes|crashing|broken|breaks|error|errors|erroring|wrong|hangs|
freezes|stuck|nothing|not|no|missing|empty|red|down|happening|happens|the same|same|getting|get|gives|
giving|throws|throwing|shows|showing|says|saying|see|seeing|returns|returning|having|have|waiting|
unresolved)
(keeps|keep|kept) (failing|crashing|breaking|erroring|hanging|freezing|looping|spinning|throwing|giving|
getting|showing|saying|returning|happening|complaining|repeating|changing|asking|buffering|loading|
disconnecting|ignoring|making|doing)
same (error|problem|issue|mistake|exception|old story|old) (again|as before|still|every time|)
same (thing|result|answer|response|output|message|behaviour|behavior) (again|as before|still|every time|
happens|happened); exact same (error|thing|problem|mistake|answer|issue)
no (luck|change|difference|dice|joy|effect|improvement|avail)
(crashed|crashes|crashing|hangs|hung|freezes|froze|frozen|segfaults|segfaulted|segfault|segmentation fault|
core dumped|timed out|times out|timeout)
(is|went|goes|comes up|came back|came up|came out|screen is|page is) (now|just|completely|totally|all|still|
) (blank|down|dead|missing|empty|unreachable|offline|corrupted|corrupt|gone|garbled|cut off|truncated|
blurry|unreadable|black|stuck); (goes|leads|went|takes me|took me|points|redirects me|redirects) nowhere
(leads|goes|takes me|took me|sends me|sent me) to (a|an|the) (404|error|dead|empty|blank|wrong|different)
dead (link|end); link (is|) (broken|dead); broken link; page not found; 404; 500 error
internal server error; access denied; permission denied; (command|module|file|package) not found
no such (file|module|command|function|method|package|thing|place|option|setting|directory|menu|button)
error; errors; exception; exceptions; stack trace; blank (page|screen); crash; glitch; glitches; glitchy
nothing but (error|errors); regression; regressions
(shows|returns|gives|prints|outputs|got|get|getting|see|showing|returning) (me|) (nothing|nan|garbage|empty|
404|500|403|an empty list|no results|no output|null); no results; no output
empty (result|results|list|page|response|output); traceback; syntaxerror; typeerror; nameerror; valueerror
keyerror; indexerror; attributeerror; importerror; modulenotfounderror; nullpointerexception
undefined is not; is not defined; (exit|exited with|status) (code|) (1|2|127|137|139); fatal error
syntax error; runtime error; compile error; compilation error
(build|tests|test|pipeline|deploy|install) (failed|fails|fail|broke|failing)
(it|this|that|you|update|fix|change|now|which) (broke|deleted|removed|ruined|corrupted|wiped|destroyed|
overwrote|bricked)
(broke|breaks|ruined|messed up|screwed up|bricked|wiped|destroyed) (it|my|the|everything|again|prod|
production|something|half|all|more|things|our)
now (everything|it) (is broken|broke|fails|is worse|is gone|crashed|crashes|will not); now nothing works
will not (start|open|load|run|compile|work|build|install|connect|boot|let me|save|play|turn on|print|update|
respond|import|even|stop|launch|render)
would not (start|open|load|run|compile|work|build|install|connect|boot|let me|save|turn on)
refuses to (start|open|load|run|compile|work|build|install|connect|let)
stopped (working|responding|loading); no longer (works|loads|starts|runs|compiles|opens)
(dont|doesnt|not) work; does not work; not working
is not a (thing|real|function|valid|word|method|solution|fix|answer)
you (forgot|missed|left out|ignored|skipped|misread|omitted|overlooked|misunderstood|mixed up|are wrong|
are mistaken|are not (listening|helping|making|getting|understanding|reading)|invented|misspelled)
you (got|have) (it|that|this|the|my) (all|completely|totally|) wrong
you (keep|kept) (saying|repeating|giving|making|doing|asking|sending|telling|changing|ignoring|forgetting|
missing|adding); you just (made|repeated|copied|ignored|deleted|broke)
(i|we) (already|have already) (tried|did|done|told|said|explained|checked|gave|answered|mentioned|asked|
sent) (that|this|it|you|); already told you; just told you; tried that already
(how many|for the (second|third|fourth|nth|last|hundredth|fifth|umpteenth)) (time|times); yet again
not again; pay attention; read (my|the) (question|message|post|request) (again|properly|carefully|first)
(i|we) (give|gave) up; giving up; forget it; never mind then
this is (ridiculous|hopeless|pointless|going nowhere|getting ridiculous|not working|useless|a waste)
going (in|around in|round in) circles; (took|takes|taking) (forever|too long|ages|way too)
(speak|talk) (to|with) (a|an) (human|person|manager|real person|representative|supervisor)
(real|actual) (person|human) please; want (a|my) (refund|money back); cancel my (subscription|account|plan)
file a complaint; switching to (chatgpt|claude|gemini|another|a different|something else|the competition)
fed up; sick of (this|it|you); tired of (this|your|you); had enough; losing patience; last straw
are you (kidding|serious|joking|blind|deaf|dumb|stupid|drunk|even (reading|listening)); you kidding
"""
"""Complaints and failures in phrases of their own."""

CORRECTION = """
(i|we) (actually|really|clearly|specifically|only|just|obviously|) (meant|specified|was asking|was talking|
was referring)
(i|we) (actually|clearly|specifically|only|just|obviously ) (said|asked|wanted|requested|ordered|needed)
i (said|asked for|asked about|wanted|requested|ordered|told you|asked you|asked how|asked why|asked what|
asked if); like i said; as i said
(no|nope|nah) (i|we) (meant|mean|need|needed|want|wanted|said|asked|would like|would rather|would prefer|
was|am looking|prefer|actually)
(no|nope|nah) (it|that|this|the|he|she|they|my|there|you|your) (is|should|are|was|were|has|have|needs|must|
said); (no|nope|nah) not (that|the|this|in|on|at|for|to)
not (the|that|this) (one|ones|way|file|version|kind|part|time|date|place|page|branch|button|hotel|
restaurant)
(that|this|it) is not (what|how|the one|the question|the right|the same|the issue|the problem|my question|
my name|quite) (i|we|)
(was|is|were|are) not what (i|we) (asked|meant|wanted|was|were|needed|had|am|said|requested|expected|
ordered)
not (quite|exactly|really|at all|) what (i|we) (asked|meant|wanted|was|were|needed|had|am|said|requested|
expected|ordered|did|think)
(that|it|this) (should|needs to|was supposed to|is supposed to|must|ought to|has to) (be|have|say|return|go|
use|read|include|point|start|show|match); supposed to be
should (have been|have said|have used|be|say|read) (a|an|the|in|on|at|more|less|called)
(you) should (have|be) (used|asked|said|given|checked|included|written|using)
instead of (that|this|the|what|a); (try|look|check|read|count) (it|that|this|) again; redo (it|this|that)
(start|do it) over; make it (shorter|longer|simpler|clearer|smaller|bigger|shorter please)
change it (to|back)
(let me|i should|i will|allow me to) (clarify|rephrase|correct|explain again|reword|be clearer|
be more specific|be more clear|restate|repeat myself|rephrase that)
(what i|i) (mean|meant) (is|was|by|to|the|a); correction; scratch that; misread (my|the|that|it|this)
wrong (one|file|place|date|day|city|name|person|version|language|account|number|format|order|size|color|
colour|year|month|branch|table|address|way|question|line|column|page|item|product|country|restaurant|hotel|
time)
(can|could) you (please|) (redo|fix (it|that|this)|correct (it|that|this)|rewrite (it|that|this)|try again|
double check|check again|recheck|revert|undo|look again|check that again|reread)
(please|you need to|you have to) (redo|correct (it|that|this)|revert|undo|double check|fix (it|that|this)|
try again|reread|recheck|check again|look again|stick to); try again
revert (it|that|this|the|your|those|these); undo (it|that|this|the|your|those|these); put it back
go back to (the|what|how)
you (confused|mixed|swapped|switched|reversed|used the wrong|picked the wrong|have the wrong|sent the wrong|
gave me the wrong|are confusing|are mixing)
"""
"""The user says again, or better, what was wanted."""

SOFT_CORRECTION = """
actually; almost; nearly; not quite; half right; partly right; partially (right|correct); so close
very close; getting (there|close|closer|warmer); halfway there; rather; instead
not (entirely|completely|totally|fully|exactly) (right|correct|true|accurate|there|done|it|clear|sure|happy|
); mostly (right|correct|works|good|there); (kind|sort) of (right|works|working|correct|helpful)
(anything|something|somewhere) else; do you have (anything|something|any other|one)
(any|some) other (options|one|ones|ideas|places|suggestions)
(more|less|shorter|longer|simpler|cheaper|closer|earlier|later|bigger|smaller|different|another) (please|
than that|than this|one instead)
"""
"""May begin a correction; gives way to praise in the same sentence."""

CONFUSION = """
what do you mean; what does (that|this|it) (even|actually|really|) mean
what (is|are) (that|this|you) supposed to mean; what are you (talking|saying|on about)
what (on earth|the hell|the heck|the fuck)
(do|did|does|can|could|still|really) not (really|quite|fully|even|at all|) (understand|get it|get this|
get that|follow|see how|see why|see what|see the point|know what (you|that|this|it)|grasp|comprehend|
figure out (what|how))
not (following|getting it|clear|sure what|sure i (understand|follow|get)|sure how (this|that|it)|
understanding|making sense); unclear; confused; confusing; baffled; puzzled; perplexed; i am lost; lost me
lost you; (over|above) my head; all greek; is greek to me; makes no sense to me
(can|could|would|will) you (please|kindly|maybe|) (clarify|elaborate|explain (that|it|this|again|more|
further|what you|better|in simpler|in plain|yourself)|rephrase|be more (specific|clear)|say that again|
repeat (that|it|yourself)|dumb (it|that|this) down|break (it|that|this) down|simplify|put (that|it) (simply|
differently|another way)); (please|pls|) (clarify|elaborate|rephrase)
(please|pls) (explain (again|better|that|further|in simpler|more simply)|say again|be more specific)
explain (again|better|like i am); in (plain|simple|simpler) (english|words|terms|language); eli5; come again
say what; say again; beg your pardon; huh; wut; wait what; wait huh; um what; sorry what; hmm what
excuse me what; (which|what) (one|part|file|step|line) (do|did|are) you (mean|talking|referring); what now
(i have|have) no idea what (you|that|this|any); no clue what; what (did|do) you just; does not compute
what even; too (complicated|technical|dense) for me; lost here; (a bit|bit|totally|completely) lost
"""
"""The answer was not understood."""

SOFT_CONFUSION = """
are you sure; you sure; (is|are) (that|this|it|you) (really|actually) (right|correct|true|the case)
doubt (it|that); i doubt; how so; are you certain
(that|this) (seems|looks|sounds) (odd|off|strange|weird|suspicious|fishy|wrong|high|low); seriously
suspicious; does not (sound|look|seem) right
"""
"""Doubt; gives way to anything plainer."""

IRONY = """
oh (great|wonderful|perfect|fantastic|brilliant|joy|lovely|super|awesome|excellent|how helpful|
wow great) (another|now|so|it|the|more|thanks|); yeah right; as if; slow clap; big help
fat lot of (good|help); lot of (good|help) (that|you) (did|was|were|are)
way to go (genius|einstein|breaking|deleting)
(well|great|good|nice|fantastic|amazing|excellent|wonderful|brilliant) (done|job|work|going) (breaking|
deleting|ruining|ignoring|crashing|making|wasting|destroying|genius|einstein|sherlock|losing|messing|
forgetting|missing|not); (genius|sherlock|brainiac|einstein)
(thanks|thank you) (so much|very much|a lot|) for (breaking|deleting|ruining|ignoring|crashing|making it|
wasting|destroying|losing|nothing|messing|wiping|not|the broken|the useless|the wrong|making things|another)
no shit; no kidding; what a (surprise|shock)
(just|exactly|precisely) what i (needed|wanted) (another|more|today|right now|a)
(wow|great|nice|cool|awesome|perfect|brilliant|fantastic|lovely|wonderful|excellent|amazing|super) (another|
yet another|more|so now|now (it|i|the|my|nothing|everything)|it (broke|crashed|failed|is broken)) (error|
crash|bug|); could not be (less|more useless|more wrong|worse|further)
(just|simply) (great|perfect|wonderful|brilliant|fantastic|lovely|peachy) (another|now|it|the)
"""
"""Praise that is not meant."""

NEUTRAL = """
my (bad|mistake|fault|error|apologies)
(sorry|oops|apologies|whoops) (my|i was wrong|wrong (chat|window|thread)); i (was|am) (wrong|mistaken)
i (made|had) (a|an) (mistake|error|typo); silly me
no (problem|problems|worries|worry|biggie|prob|probs|stress|need|rush|preference|thanks|thank you|thankyou|
matter|doubt|hurry|offense|idea); not a problem; not to worry; no i (do not|am (good|fine|okay)|will not)
do not (worry|care|mind|need|have a preference|bother|hesitate|stress)
not (sure if|sure yet|really sure yet|yet|necessary|needed|important|urgent|picky|right now|at the moment|
only|just|to mention|necessarily|now); why not; whatever works; if not; or not
does not (matter|have to|need to); is not it; are not you
no (not really|nothing|i can not think of anything); (thanks|thank you) in advance
what (is|was|went|goes|could be|might be) wrong (with|here|in|)
wrong with (my|the|this|it|that|your|me|their); too bad; what is (right|correct)
(right|good|great|nice|better|best|bad) (now|time|place|side|hand|away|after|before|practice|practices|
way to|ways to|in class|thing to do)
(error|errors|exception|failure|crash|bug) (handling|message|messages|code|codes|handler|rate|log|logs|
reporting|report|class|type|types|boundary|tracking|reports|recovery|budget|bars)
bug (fix|fixes|tracker|bounty); broken (down|into|up into|heart|arm|leg|english)
failed (login|attempts|payments); false (positive|positives|negative|negatives|flag)
bad (request|gateway|weather|debt|habit|habits|dream|breath); true or false; or false; returns false
is false; to false; happy (birthday|hour|new year|path|to|ending); glad (to hear|to help|i could)
good (morning|afternoon|evening|night); nice (to meet|weather|place|restaurant|hotel|day|and)
cool (down|place|stuff like); great (britain|place|time|barrier|wall|deal|hotel|restaurant)
"""
"""Looks like feedback and is not: takes its words away from the other lists."""
