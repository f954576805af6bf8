"""What people say after an answer: one table of phrases a language. Data, and how it is compiled; judges nothing.

A phrase is a regular expression over text in lower case with single blanks and straight apostrophes. `<end>` stands for
the end of the text or a mark other than `?`: what goes on with a word ("perfect pitch"), or asks, is something else.
"""

import re
from functools import cache

import msgspec

_END = r"(?=\s*(?:$|[^\w\s'?]))"


class Language(msgspec.Struct, frozen=True, kw_only=True):
    """The phrases of one language. All but `clouds` are looked for where a clause begins, behind `fillers`.

    `weak` corrections count only if the answer asked nothing. `spared` begins what is no correction though it looks
    like one, `unthankful` what is no thanks. `lead_in` may stand between the beginning and thanks. `clouds` anywhere in
    a sentence of thanks make it doubtful. `again` says that a request was made before; `polite` are words (by
    blanks) that make no difference to a request. What begins with `dictation` is something to write, whoever says it.
    """

    fillers: tuple[str, ...]
    corrections: tuple[str, ...]
    weak: tuple[str, ...]
    spared: tuple[str, ...]
    thanks: tuple[str, ...]
    unthankful: tuple[str, ...]
    lead_in: tuple[str, ...]
    clouds: tuple[str, ...]
    again: tuple[str, ...]
    polite: str
    retry: tuple[str, ...]
    abandonment: tuple[str, ...]
    dictation: tuple[str, ...]


class Phrases(msgspec.Struct, frozen=True, kw_only=True):
    """The same compiled: patterns to `match`, but `clouds` to `search`."""

    fillers: re.Pattern[str]
    corrections: re.Pattern[str]
    weak: re.Pattern[str]
    spared: re.Pattern[str]
    thanks: re.Pattern[str]
    unthankful: re.Pattern[str]
    lead_in: re.Pattern[str]
    clouds: re.Pattern[str]
    again: re.Pattern[str]
    polite: frozenset[str]
    retry: re.Pattern[str]
    abandonment: re.Pattern[str]
    dictation: re.Pattern[str]


_IT = (
    "(?:that|this|it|which|you|those|these|they|your (?:answer|reply|response|code|solution|summary|"
    "translation|version)"
    "|the (?:answer|result|code|output|translation|summary|number|date|name|link))"
)
_HOW = "(?: [a-z]+ly| just| still| all| so| quite| even| also| a bit| again)*"

ENGLISH = Language(
    fillers=(
        "h+m+|u+h+m?|u+m+|oh|ah|well|so|hey|hi|sorry|ok|okay|and|but|yes|yeah|haha|wait|look|please|dude|"
        "ugh|wow|thanks",
        "i think|i'm afraid|i believe|i guess|unfortunately",
    ),
    corrections=(
        f"{_IT}(?:'s|'re| is| are| was| were| looks| seems| sounds){_HOW} (?:wrong|incorrect|false|mistaken|inaccurate|"
        "outdated|nonsense|useless|garbage|unhelpful)(?! (?:of|for|with|about|to|when|on))",
        f"{_IT}(?:'s|'re| is| are| was| were){_HOW} (?:not{_HOW} (?:right|correct|true|accurate|helpful|working|"
        "what i|how i|the one i|the \\w+ i)|the wrong|in the wrong)",
        f"{_IT} (?:isn't|aren't|wasn't|weren't){_HOW} (?:right|correct|true|accurate|helpful|working|what i|how i|the "
        "one i|the \\w+ i)",
        f"{_IT}{_HOW} (?:doesn't|don't|does not|do not|didn't|did not|won't){_HOW} (?:look right|seem right|"
        f"sound right|"
        "make sense|help<end>|help me|answer my|answer the question|work|compile|match)",
        f"{_IT} (?:can't|cannot) be right",
        "(?:still )?(?:doesn't|does not|didn't|did not|not|isn't) work(?:ing)?",
        f"{_IT}(?: still| always| now)? (?:fails|failed|crashes|crashed|throws|breaks)",
        "still (?:wrong|broken|not (?:right|correct|working|what)|the same (?:error|problem|result)|fails|failing)",
        "(?:the )?same (?:error|problem|issue)<end>|(?:the )?same (?:error|problem|issue) (?:as|again)",
        "wrong(?: \\w+)?<end>|incorrect<end>|false<end>|nope,? wrong",
        "not (?:quite |really |entirely |exactly |at all )?(?:right|correct|true)<end>",
        "not (?:quite |really |exactly |at all )?(?:what|how|the one) i ",
        "(?:i|we) (?:didn't|did not|never) (?:ask|asked|request|requested|say|said|mean|meant)(?: you)?"
        "(?: for| about| to| that| this| it| any| anything|<end>)",
        "(?:i|we) (?:didn't|did not|don't) want (?:that|this|it|you to)",
        "i (?:asked|wanted|said|need|needed|told you) [^.?!]{1,60}\\bnot ",
        "i (?:asked|told) you (?:to|not|for|about|that|it)",
        "you(?:'ve| have)?(?: \\w+ly| just| again)? (?:misunderstood|misread|misheard|missed (?:the|a|one|two|my|some)|"
        "forgot|forgotten|ignored|skipped|mixed up|hallucinated|lied|made (?:a|an|another) (?:mistake|error)|"
        "made (?:that|this|it) up)",
        "you(?:'ve| have)?(?: \\w+ly| just| again)? got (?:it|that|this|me|the \\w+)(?: \\w+ly| all)? wrong",
        "you(?:'ve| have)? [^.?!,]{1,30} the wrong ",
        "you (?:still )?(?:didn't|did not) (?!have to|need to|miss)\\w+",
        "you (?:still )?(?:haven't|have not) (?:answered|done|fixed|read|included|changed|understood)",
        "(?:it|that|this|he|she|they|the \\w+|my \\w+)(?:'s|'re| is| was| are| were) [^.?!,]{1,40}, not ",
        "(?:it|that|this|the \\w+) should have been",
        "what i (?:meant|asked for|wanted) (?:was|is)",
        "(?:the|that) (?:\\w+ ){1,3}(?:is|was|are|looks)(?: still| just| actually)? (?:wrong|incorrect)(?! "
        "(?:with|about))",
        "(?:that|this|there) (?:\\w+ )?(?:doesn't|does not|didn't) exist|there(?:'s| is) no such",
        "you(?:'re| are) (?:hallucinating|confused|making (?:this|that|it|things) up)",
        "(?:that's|this is|that is) [^.?!,]{1,40}, (?:but )?i (?:need|needed|want|wanted|asked|said|meant)\\b",
        "👎",
    ),
    weak=(
        "(?:no+(?:,? no+)*|nope|nah)(?:<end>(?![,.! ]*(?:wait|hold on|first|let's|rather))| (?:dude|man|bro|mate),)",
        "i (?:actually |really |rather )?meant|i was (?:talking|asking) about",
        "actually,? (?:it|that|this|he|she|they|there|the [\\w-]+|my [\\w-]+)(?:'s|'re| is| was| are| were| has) (?!"
        "(?:\\w+ly )?(?:fine|ok|okay|great|good|perfect|right|correct|better|nice|pretty|quite|very|working|what i))",
    ),
    spared=(
        "no[,!.]* (?:thanks|thank you|thx|all good|all fine|that's (?:all|fine|it|ok|okay|good|great)|that is all|"
        "that will be all|it's (?:fine|ok|okay|all good|good)|nothing|i'm (?:good|fine|ok)|problem|worries|need|rush)",
    ),
    thanks=(
        "(?:many |so many |big |ok |okay )?(?:thanks|thx|thanx|tysm|ty|cheers|sweet|lgtm|much better|much "
        "appreciated)(?:<end>| (?:a lot|a million|"
        "so much|very|"
        "again|man|mate|buddy|for (?:the|your|that|this|all|your|clarifying|explaining|helping)|that|this|it|you|now))",
        "thank(?: you|u)(?:<end>| (?:so|very|for|that|this|again|it))",
        "(?:that's |that is |this is |it's |just |simply |absolutely |really |very |so |oh )*(?:great|"
        "perfect|excellent|"
        "awesome|amazing|brilliant|fantastic|wonderful|superb|lovely|beautiful|nice|very good|well done|helpful|"
        "impressive)(?:<end>| (?:now |thanks|thank you|job|work|answer|idea|stuff|explanation|summary|that works|i "
        "love))",
        "(?:that's |this is |it's )?exactly(?:<end>| what i | right| how i )",
        "(?:good|great|nice|excellent|amazing|fantastic) (?:job|work|answer|explanation|one)<end>",
        "(?:that|this|it)(?: all| now| really| finally| totally)? (?:works|worked|helps|helped|did it|did the trick|"
        "solved it|fixed it|makes sense)(?: now| perfectly| great| well| a lot| like a charm)*<end>",
        "works(?: now| perfectly| great| fine| like a charm)*<end>",
        "(?:that's|this is|that was) (?:what i (?:wanted|needed|was looking for|meant)|it)<end>",
        "(?:i )?(?:really )?(?:love|like) (?:it|this|that)<end>|you(?:'re| are) (?:the best|awesome|amazing|a genius)",
        "(?:👍|❤|🙏|👏|🎉|💯|😍|🥰)+(?=\\s*(?:$|[^\\w\\s]))",
    ),
    unthankful=(
        "(?:thanks|thank you|thx)[,]? (?:for nothing|in advance|anyway|to |but |though|letter|note|card|mail|email|"
        "message|speech|gift|present|a lot for nothing|for (?:your|the) help in advance)",
        "(?:wow|oh|yeah|just),? (?:great|perfect|wonderful|fantastic|brilliant)|great, just great|nice try",
        "(?:great|perfect|nice|lovely)(?:,| )+(?:another|so now|as always|again)",
        "(?:you're|that's|it's) so (?:funny|great)|thanks obama",
    ),
    lead_in=(
        "got it|makes sense|(?:that |this |it )(?:makes|made) sense(?: now)?|i see|understood|alright|all right|right",
        "good to know|cool|nice one|yep|yup|sure|fine|good|wonderful|i'll (?:try|do|take) (?:that|it|this)",
        "(?:that's |that is |it's |this is )?(?:correct|right|the (?:right )?one)|exactly that",
    ),
    clouds=(
        "but|however|except|though|although|unfortunately|myself|broken|broke|breaks?|doesn't|does not|didn't|did not",
        "isn't|aren't|wasn't|won't|can't|cannot|not|never|errors?|fail(?:s|ed|ing|ure)?|crash(?:es|ed|ing)?|"
        "wrong|worse",
        "worst|nothing|lost|deleted|gone|useless|still|stuck|yeah right|just what i needed|sarcas\\w+|no longer|hate",
        "/s|🙄|😒|🤦\\S*|🖕|👎",
    ),
    again=(
        "(?:once )?again\\s*[,:]|(?:as|like) i said|i said|i (?:already|just) (?:said|asked|told)|i repeat|i asked",
        "for the (?:second|third|last|\\w+th) time|my question was|let me (?:ask|say|repeat) (?:that |it )?again",
    ),
    polite=(
        "please again now just kindly could can would you i said say asked ask as like already told told "
        "once more so hey"
        " for me the a an my question was is time second third last repeat let to about still"
    ),
    retry=(
        "(?:just |please |can you )?(?:try|do|run) (?:it |that |this |once )?(?:again|once more)",
        "retry|regenerate|redo",
    ),
    abandonment=(
        "(?:oh |just )?(?:forget (?:it|about it|that)|never ?mind|i give up|stop it|drop it|leave it|cancel that|"
        "i'll do it myself|this is hopeless|this is pointless|whatever)",
    ),
    dictation=(
        "(?:please |can you |could you |now |then |and )*(?:write|say|tell|reply|answer|translate|send|post|type|print|"
        "draft|respond|text|spell|define|repeat|how do i say|what does)",
    ),
)

_DAS = "(?:das|dies|es|er|sie|du|die (?:antwort|lösung|übersetzung|zahl|zusammenfassung)|der (?:code|text|link|name))"
_WIE = (
    "(?: leider| aber| doch| so| ja| komplett| ganz| total| völlig| einfach| immer noch| noch| auch| wieder| mir| gar)*"
)

GERMAN = Language(
    fillers=(
        "h+m+|äh+m?|oh|ach|ah|na ja|naja|also|tja|sorry|ok|okay|und|aber|ja|haha|moment|warte|leider|bitte|"
        "du(?=,)|hey|hallo",
        "ich glaube|ich fürchte|entschuldigung|danke",
    ),
    corrections=(
        f"{_DAS} (?:ist|war|sind|waren|bist){_WIE} (?:falsch|verkehrt|unsinn|quatsch|nonsens|unbrauchbar)",
        f"{_DAS} (?:ist|war|sind|waren|stimmt|stimmen){_WIE} (?:nicht|nich){_WIE}(?: ganz)?(?: (?:richtig|korrekt|wahr|"
        "das,? was|was ich|wie ich|hilfreich)|<end>)",
        f"{_DAS} (?:ist|war|sind|waren){_WIE} (?:der|die|das|den|dem) falsche",
        f"(?:{_DAS} )?stimmt{_WIE} nicht",
        f"(?:{_DAS} )?(?:funktioniert|geht|klappt|läuft|hilft|passt|kompiliert){_WIE} nicht",
        f"{_DAS} hat{_WIE} nicht(?: \\w+)? (?:funktioniert|geklappt|geholfen|gestimmt)",
        "falsch(?:e[rsn]? \\w+)?<end>|nicht richtig<end>|nicht korrekt<end>|der gleiche fehler|derselbe fehler",
        "(?:immer noch|noch immer) (?:falsch|nicht|der gleiche|derselbe|kaputt)",
        "nicht (?:das,? )?(?:was|wie|wonach|worum) ich ",
        "(?:so|das) (?:war|habe?) (?:das |es |ich )+(?:so |doch |gar )*nicht (?:gemeint|gefragt|gesagt|"
        "gewollt|verlangt)",
        "(?:das|so) meinte ich (?:doch |so )?nicht|(?:danach|darum|das) (?:habe?|hatte) ich (?:doch |gar |dich )*nicht",
        "ich habe? (?:doch |dich |gar )*nicht (?:danach|darum|nach|um)",
        "ich (?:wollte|sagte|brauche|brauchte|meinte|habe?) [^.?!]{1,60}(?:, | und )(?:nicht|kein)",
        "ich habe? (?:dich|dir|dir doch|dich doch) (?:gebeten|gesagt|gefragt|nach)",
        "du hast (?:mich |das |es |wieder |da |etwas )*(?:falsch|missverstanden|nicht )",
        "du hast [^.?!]{1,40}(?:vergessen|übersehen|verwechselt|ignoriert|übersprungen|erfunden|falsch)",
        "du (?:irrst|täuschst) dich|da (?:irrst|täuschst) du dich|da ist ein fehler|da stimmt",
        "(?:es|das|er|sie) (?:ist|war|heißt|sind) [^.?!,]{1,40}, nicht ",
        "es (?:müsste|sollte|hätte) [^.?!]{1,40}(?:heißen|sein sollen|sein müssen)",
        "das gibt es (?:so |gar |überhaupt |doch )*nicht|gemeint war|👎",
    ),
    weak=(
        "(?:nein(?:,? nein)*|nee+|ne|nö+)<end>(?![,.! ]*(?:warte|moment|erst|lieber|doch))",
        "ich (?:meinte|meine) (?!ja|dass es)|ich rede von|es geht um",
        f"eigentlich (?:ist|war|heißt|sind) {_DAS} (?!(?:ganz|sehr|schon)? ?(?:gut|ok|okay|super|perfekt|richtig))",
        "nein (?:das|es|er|sie|ich|du|nicht|der|die|in|am|um)\\b",
    ),
    spared=(
        "nein[,!.]* (?:danke|vielen dank|alles gut|das (?:war's|wars|ist alles|reicht|passt|ist gut|ist ok)|"
        "passt|schon "
        "gut|nicht nötig|nichts|mehr brauche ich|kein problem|ich brauche)|nee,? danke|kein problem|keine "
        "(?:ahnung|sorge|"
        "eile|frage)|nicht (?:schlecht|übel|nötig|schlimm)|nicht wahr",
        "das passt nicht in den",
    ),
    thanks=(
        "(?:vielen |besten |herzlichen |lieben |tausend )?dank(?:<end>| (?:dir|euch|ihnen|für|auch))",
        "(?:ok |okay )?(?:danke+|dankeschön|danke schön|merci|thx|mega)(?:<end>| (?:dir|schön|sehr|euch|für|"
        "nochmal|das|dafür|"
        "genau|jetzt|vielmals|super|perfekt))",
        "(?:das ist |ist |sehr |echt |wirklich |einfach |absolut |ganz )*(?:perfekt|super|klasse|toll|prima|spitze|"
        "wunderbar|großartig|genial|hervorragend|ausgezeichnet|sehr gut|sehr hilfreich|hilfreich|top|richtig gut)"
        "(?:<end>| (?:danke|vielen dank|gemacht|so|jetzt|gelöst|arbeit|das|antwort|erklärt|zusammengefasst))",
        "genau(?:<end>| (?:so|das|richtig)(?: |<end>))|gut gemacht|gute arbeit|gute antwort|passt(?: so)?<end>",
        "(?:das|es|so|jetzt|nun)(?: \\w+)? (?:funktioniert|klappt|hilft|passt|läuft)(?: jetzt| super| gut| "
        "perfekt| mir|"
        " sehr| weiter| prima| alles| wunderbar)*<end>",
        "(?:jetzt|nun|so) (?:funktioniert|klappt|passt|läuft) (?:es|das|alles)(?: perfekt| super| wunderbar)*<end>",
        "(?:das|es) hat (?:super |gut |prima |mir |sehr |jetzt |wunderbar )*(?:funktioniert|geklappt|geholfen)<end>",
        "(?:das|es) (?:war|ist) (?:genau )?(?:es|was ich (?:wollte|brauchte|brauche|gesucht habe))<end>",
        "gefällt mir(?: sehr| gut)*<end>|(?:👍|❤|🙏|👏|🎉|💯|😍|🥰)+(?=\\s*(?:$|[^\\w\\s]))",
    ),
    unthankful=(
        "(?:danke|vielen dank|besten dank|dank)[,]? (?:für nichts|im voraus|trotzdem|aber|nein)",
        "(?:na|oh|ja),? (?:super|toll|klasse|prima|perfekt|wunderbar|danke)|nicht (?:so )?(?:toll|gut|super)",
    ),
    lead_in=(
        "verstehe|verstanden|alles klar|(?:das )?(?:ergibt|macht) sinn|aha|gut|schön|stimmt|cool|fein|klar|in ordnung",
        "(?:das (?:ist|war) )?(?:richtig|korrekt)|das (?:ist|war) (?:er|sie|es)",
        "gut zu wissen|das probiere ich(?: aus)?|mache ich",
    ),
    clouds=(
        "aber|jedoch|leider|trotzdem|allerdings|obwohl|kaputt|fehler|fehlermeldung|nicht|nichts|kein\\w*|falsch|nie",
        "schlimmer|schlechter|gelöscht|weg|verloren|immer noch|noch immer|abgestürzt|selbst|ironie|🙄|😒|👎",
    ),
    again=(
        "wie gesagt|(?:noch ?mal|nochmals|erneut)\\s*[,:]|ich sagte|ich habe? (?:doch |schon |bereits |gerade )+gesagt",
        "ich habe? (?:doch |schon |bereits |gerade )*gefragt|meine frage war|zum (?:zweiten|dritten|"
        "letzten) mal|ich fragte",
        "ich wiederhole",
    ),
    polite=(
        "bitte nochmal noch mal nochmals erneut wie gesagt ich sagte habe hab doch schon bereits gerade gefragt fragte"
        " meine frage war zum zweiten dritten mal der die das den dem ein eine einen mir mich jetzt kannst könntest du"
        " auf zu nun einmal"
    ),
    retry=(
        "(?:bitte )?(?:versuch|versuche|probier|probiere|mach|mache)(?:'s| es| das)? (?:bitte )?(?:noch ?mal|erneut)",
    ),
    abandonment=(
        "vergiss es|vergiss das|lass (?:es|gut sein|mal)|egal|ich gebe? (?:es )?auf|dann mache? ich (?:es|das) selb",
    ),
    dictation=(
        "(?:bitte |kannst du |jetzt |dann |und )*(?:schreib|sag|sage|antworte|übersetze?|sende?|schicke?|"
        "erzähl|formuliere|"
        "buchstabiere|definiere|wie sagt man|was heißt|richte)",
    ),
)

LANGUAGES: dict[str, Language] = {"en": ENGLISH, "de": GERMAN}
"""A language is a row here."""


@cache
def phrases_of(name: str) -> Phrases:
    """The compiled table of a language. Raises KeyError: there is none."""
    table = LANGUAGES[name]
    patterns = {
        field: _compiled(getattr(table, field), anywhere=field == "clouds")
        for field in Language.__struct_fields__
        if field != "polite"
    }
    return Phrases(polite=frozenset(table.polite.split()), **patterns)


def _compiled(phrases: tuple[str, ...], *, anywhere: bool) -> re.Pattern[str]:
    choice = "|".join(f"(?:{phrase})" for phrase in phrases).replace("<end>", _END)
    start = "(?<![\\w'])" if anywhere else ""
    return re.compile(f"{start}(?:{choice})(?:(?<= )|(?![\\w']))")
