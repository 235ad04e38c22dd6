"""Basic phrases of other languages that say how an answer was taken, in the notation of `feedback_lexicon`.

Words that mean something else in English ("no", "gut", "bad", "net", "die") stand only inside longer phrases.
"""

from __future__ import annotations

PHRASES: dict[str, str] = {
    "T": """
danke; dankeschön; dankeschoen; danke (schön|sehr|dir|ihnen); vielen dank; herzlichen dank; besten dank
merci; merci (beaucoup|bien); gracias; (muchas|mil) gracias; obrigado; obrigada; valeu; muito obrigado
muito obrigada
grazie; grazie mille; mille grazie; ti ringrazio; bedankt; dank (je|u); dankjewel; dankuwel; hartelijk dank
dziękuję; dziekuje; dzięki; dzieki; wielkie dzięki; teşekkürler; teşekkür ederim; tesekkurler; sağ ol; sağol
çok sağol; eyvallah
спасибо; спасибо большое; большое спасибо; благодарю; спс
""",
    "P": """
super; prima; klasse; spitze; genial; großartig; grossartig; ausgezeichnet; hervorragend; wunderbar; perfekt
einwandfrei
sehr (gut|hilfreich|schön); (ist|war) (gut|richtig|korrekt|hilfreich); stimmt; genau; gut (gemacht|erklärt)
hilfreich
parfait; parfaite; génial; excellente; magnifique; formidable; impeccable; très (bien|bon|bonne|utile|clair)
bien (joué|vu); utile
c'est (bon|ça|parfait|super|génial|exact|juste|correct|bien); exactement; bonne réponse
perfecto; perfecta; genial; excelente; fantástico; estupendo; buenísimo; maravilloso
muy (bien|bueno|buena|útil|claro); exacto; correcto
(está|esta|es) (bien|perfecto|correcto|correcta|genial|excelente); qué (bien|bueno); útil
de acuerdo perfecto; buen trabajo; bien hecho
perfeito; perfeita; ótimo; ótima; otimo; excelente; maravilha; muito (bom|boa|bem|útil); exato; exatamente
isso mesmo; bacana; certinho
perfetto; perfetta; ottimo; ottima; eccellente; fantastico; bravissimo; benissimo; molto (bene|utile|buono)
esatto; giusto; corretto; va benissimo
perfect zo; geweldig; uitstekend; fantastisch; heel goed
(erg|zeer|heel) (goed|handig|nuttig|fijn|duidelijk); klopt; precies; goed gedaan; mooi zo; handig
lekker bezig
świetnie; swietnie; doskonale; super; idealnie; znakomicie; rewelacja
bardzo (dobrze|dobra|dobre|pomocne|przydatne); dobra robota; dokładnie; zgadza się; pomocne
harika; mükemmel; mukemmel; süper; çok (iyi|güzel|faydalı|yararlı|başarılı); aynen; tam olarak; doğru; güzel
şahane; muhteşem; yardımcı oldu
отлично; супер; идеально; прекрасно; замечательно; великолепно; класс; классно; круто; здорово; верно
правильно; точно; именно; очень (хорошо|полезно|помогло); хорошая работа; молодец; огонь; полезно
""",
    "S": """
(das|es|jetzt|hat) (hat|) (funktioniert|geklappt|geholfen|klappt)( jetzt| super| gut|)
funktioniert (jetzt|super|perfekt|gut|einwandfrei|wieder); (jetzt|nun) (funktioniert|klappt|geht) es
problem gelöst; passt so; genau (das|was) (wollte|brauchte|suchte) ich; genau das
(ça|ca|cela) (marche|fonctionne|a marché|a fonctionné|m'a aidé|m'aide)( maintenant| bien| très bien|)
problème (résolu|réglé); c'est réglé; exactement ce (que je|qu'il)
(ya|ahora|eso) (funciona|funcionó|sirvió|sirve)( bien|)
(me|eso) (funcionó|sirvió|ayudó|ha servido|ha funcionado|sirve)
problema (resuelto|solucionado|resolvido|risolto); justo lo que (necesitaba|buscaba|quería)
exactamente lo que
(agora|isso) (funciona|funcionou|ajudou|deu certo)( bem|); funcionou; deu certo
(era|é) (isso|exatamente isso) (mesmo|); exatamente o que
(ora|adesso|ha) (funziona|funzionato|va)( bene| perfettamente|); proprio quello che
tutto (risolto|ok|chiaro|a posto); risolto
(het|dat|nu) werkt( nu| goed| perfect| weer|); opgelost
(precies|exact) wat ik (zocht|nodig had|wilde|bedoelde); helemaal (goed|top|duidelijk); het is gelukt
gelukt
(to|teraz|już) działa( teraz| dobrze| świetnie|); działa; zadziałało; pomogło; rozwiązane
właśnie tego (szukałem|szukałam|potrzebowałem|potrzebowałam); o to chodziło; udało się
(şimdi|artık|bu) (çalışıyor|oldu|çalıştı|düzeldi|işe yaradı); işe yaradı; çalıştı; oldu bu; sorun çözüldü
çözüldü; tam (istediğim|aradığım); tam istediğim gibi
(теперь|всё|все|это) (работает|заработало|получилось|помогло|сработало); заработало; получилось; сработало
помогло; проблема решена; решено; то что (нужно|надо); именно то; то что я (искал|искала|хотел|хотела)
""",
    "N": """
falsch; schlecht; unsinn; quatsch; blödsinn; nutzlos; fehlerhaft; schrecklich; furchtbar; enttäuschend
scheiße; unbrauchbar; schlimmer
(nicht|nie) (gut|richtig|korrekt|hilfreich|so gut|besonders hilfreich|zufrieden); stimmt (so |leider |)nicht
(ist|war) (leider |)(nicht|kein) (richtig|korrekt|hilfreich|gut); keine (hilfe|ahnung was das)
faux; fausse; incorrecte; nul; nulle; inutile; mauvais; mauvaise; n'importe quoi; horrible; décevant; pire
(pas|jamais) (bon|bonne|bien|correct|utile|ça|juste|vrai|du tout|satisfait|terrible|parfait)
c'est pas (bon|ça|correct)
incorrecto; incorrecta; inútil; pésimo; horrible; mentira; basura; malo; mala; peor; equivocado; equivocada
(no|nada) (es |está |esta |)(correcto|correcta|bien|útil|perfecto|cierto|verdad|bueno)
no (sirve|me sirve|me gusta|ayuda); está mal
errado; errada; péssimo; péssima; horrível; ruim; pior; inútil
não (está |é |)(certo|correto|bom|útil|verdade|isso|perfeito); não (gostei|serve|ajudou|ajuda)
sbagliato; sbagliata; errato; pessimo; orribile; inutile; peggio; schifo
non (è |e |va |)(corretto|giusto|bene|utile|vero|quello|perfetto); non (mi piace|serve|aiuta|va)
fout; verkeerd; slecht; waardeloos; nutteloos; onzin; vreselijk; onjuist
niet (goed|juist|correct|handig|waar|nuttig|best|zo goed|tevreden); klopt niet; teleurstellend
źle; zle; błędne; błędna; błąd; bzdura; bzdury; bezużyteczne; okropne; beznadziejne; gorzej; nieprawda
niepoprawne; nie (jest |)(dobrze|poprawne|prawda|idealnie|pomocne); nie (pomogło|pomaga|podoba mi się)
do niczego
yanlış; yanlis; kötü; berbat; saçma; saçmalık; işe yaramaz; hatalı; rezalet
(doğru|iyi|güzel|faydalı|yararlı) değil; daha kötü; beğenmedim
неверно; неправильно; ерунда; чушь; бред; плохо; ужасно; бесполезно; ошибочно; хуже; отстой; фигня
не (верно|правильно|то|хорошо|помогло|помогает|правда|нравится|идеально|очень)
""",
    "F": """
funktioniert (leider |immer noch |noch immer |das |es |)(gar |überhaupt |)nicht( mehr|)
(geht|klappt) (leider |immer noch |das |es |)(gar |)nicht( mehr|)
(hat|das hat) (leider |)nicht (funktioniert|geklappt|geholfen)
immer noch (der gleiche |derselbe |)(fehler|kaputt|falsch|nicht); abgestürzt; kaputt; fehlermeldung
der gleiche fehler
(ne |)(marche|fonctionne) (toujours |)(pas|plus)( du tout|); (n'a|ça n'a) pas (marché|fonctionné|aidé)
toujours (la même|le même|pas|une) (erreur|problème|bon|ça); toujours pas; en panne; message d'erreur
la même erreur
(no|ya no|sigue sin|tampoco) (funciona|funcionó|funcionar|me funciona|sirvió|carga|abre|ayudó)
(el |)mismo error; sigue (igual|fallando|dando error|roto); da error; se (cerró|colgó|rompió); está roto
(não|nao|ainda não|continua sem) (funciona|funcionou|funcionar|carrega|abre|deu certo); (o |)mesmo erro
deu erro; continua (dando erro|igual|quebrado); travou; quebrou; está quebrado
(non|ancora non) (funziona|ha funzionato|va|si apre|carica|ha aiutato); (lo |)stesso errore; dà errore
si è (bloccato|rotto|chiuso); è rotto
(werkt|werken|doet het|lukt|helpt) (nog steeds |helaas |het |dit |dat |)niet( meer|)
nog steeds (dezelfde|niet|een|kapot|fout)( fout|); dezelfde fout; foutmelding; kapot; vastgelopen; gecrasht
(nadal |wciąż |)nie (działa|zadziałało|otwiera się|ładuje się|uruchamia się); ten sam błąd; zepsute
zepsuło się; zawiesza się; wywala (się|błąd); nadal (błąd|to samo|nie)
(hala|hâlâ|hiç|) çalışmıyor; (hala|hâlâ) (aynı|olmuyor|olmadı|hata)( hata|); aynı hata; olmadı; olmuyor
bozuldu; bozuk; çöktü; hata (verdi|veriyor|alıyorum|aldım); açılmıyor; işe yaramadı
(всё ещё |все еще |до сих пор |всё равно |) не (работает|заработало|открывается|запускается|сработало|
получилось|грузится); та же (ошибка|проблема|самая ошибка); та же самая ошибка; сломалось; сломано; вылетает
зависает; упало; выдаёт ошибку; выдает ошибку; ошибка
""",
    "X": """
(nein|ne) (ich|das|nicht|es|wir) (meinte|meine|will|wollte|brauche|suche|ist|war|das|den|die)
ich (meinte|meine|wollte|habe gesagt|sagte|hatte gesagt); so war das nicht gemeint
das (meinte|wollte|meine) ich nicht; nicht (das|den|die|der) (was|eine|falsche); sondern; stattdessen
eigentlich
(non|mais) (je|c'est|pas|ce n'est) (voulais|veux|parlais|parle|cherche|demandais|pas|le|la|celui)
je (voulais dire|voulais|parlais de|parle de|veux dire|cherchais|demandais|disais)
(ce n'est|c'est) pas ce que (je|j'ai); pas (celui|celle|ça) (ci|là|que); plutôt; en fait
(no|pero) (yo|quería|quiero|quise|me|es|era|necesito|busco|hablaba) (quería|quiero|refiero|refería|decir|un|
una|eso|el|la|lo); me (refería|refiero) a; quise decir; quería decir
lo que (quiero|quería|dije|pedí|necesito) (es|decir|era)
no (eso|es eso|era eso|es lo que|ese|esa|el|la) (pedí|quería|no|que|dije); en realidad; dije; más bien
(não|nao) (eu|é|era|quero|queria|foi|esse|essa) (queria|quero|isso|quis|preciso|um|o|a)
eu (quis dizer|queria|pedi|disse|me referia|falei); não (é|era|foi) (isso|o que) (que|eu|pedi); na verdade
(no|non) (intendevo|volevo|cercavo|parlavo|quello|è quello|era quello) (dire|il|la|un|che|quello)
(intendevo|volevo dire|ho detto|ho chiesto|mi riferivo); non (è|era) quello che; in realtà; piuttosto
(nee|nou) (ik|dat|niet|het) (bedoelde|bedoel|wil|wilde|zocht|zoek|is|was|die|dat)
ik (bedoelde|bedoel|wilde|zei|vroeg); dat (bedoelde|bedoel|vroeg|wilde) ik niet
niet (deze|die|dat) (maar|een); eigenlijk
(nie|nie nie) (chodziło|chodzi|to|ten|ta|chciałem|chciałam|miałem|miałam) (mi|o|nie|na)
(chodziło|chodzi) mi o; (miałem|miałam) na myśli; nie o to (mi |)(chodziło|chodzi|pytałem|pytałam)
(prosiłem|prosiłam|pytałem|pytałam) o; właściwie; raczej
(hayır|yok) (ben|o|bu|öyle|onu|bunu|demek) (değil|istedim|istiyorum|dedim|kastettim|istediğim)
demek istedim; demek istediğim; (ben|onu|bunu) (kastettim|sordum|istemedim|kastetmedim|demedim|istedim)
onu değil; bunu değil; öyle değil; aslında
нет (я|не|это|мне|другой|другую|нужно|надо); я (имел|имела) (в виду|ввиду)
(не|это не) (то|так|тот|та|об этом) (что|я|про)
я (просил|просила|спрашивал|спрашивала|хотел|хотела|говорил|говорила) (другое|о|про|не); вообще то
на самом деле; а не
""",
    "Q": """
(das |)verstehe (ich |das |)(nicht|nicht ganz); ich verstehe (nicht|das nicht|es nicht|kein wort)
was (meinst du|meinen sie|heißt das|bedeutet das|soll das heißen|soll das)
wie (bitte|meinst du das|meinen sie das); hä; unklar; kannst du das (nochmal |genauer |)(erklären|erläutern)
können sie das (nochmal |genauer |)erklären; (bitte |)genauer erklären
(je ne|j'ai pas|je n'ai pas|je) (comprends|comprend|compris|comprends) (pas|rien)
je ne comprends (pas|rien); comprends pas; pas (compris|clair)
(que|qu'est ce que) (veux|voulez|ça) (tu|vous|veut) dire; c'est à dire
pouvez vous (expliquer|préciser|clarifier); (peux tu|tu peux) (expliquer|préciser|clarifier|réexpliquer)
pardon quoi
no (entiendo|entendí|comprendo|me queda claro|lo entiendo|está claro|te entiendo)
(qué|que) (quieres|quiere|significa) (decir|eso); cómo así
(puedes|podrías|puede) (explicar|aclarar|explicarlo|aclararlo|explicarme); no capto
estoy (confundido|confundida|perdido|perdida); no sé a qué
não (entendi|entendo|compreendo|compreendi|ficou claro|está claro)
(o que|como assim) (quer|significa|você) (dizer|isso|quer); como assim
(pode|poderia|dá pra) (explicar|esclarecer) (melhor|de novo|isso); (estou|fiquei) confuso
(estou|fiquei) confusa
non (capisco|ho capito|mi è chiaro|è chiaro|comprendo); (cosa|che) (vuoi|vuol|significa|intendi) (dire|dici)
in che senso; (puoi|può|potresti) (spiegare|chiarire|spiegarmi|spiegarlo); sono confuso; sono confusa
(ik |)(snap|begrijp) (het |dit |dat |er |)(niet|niks|niets); niet duidelijk; wat bedoel (je|u)
hoe bedoel je; (kun|kan) je dat (uitleggen|toelichten|verduidelijken); onduidelijk
nie (rozumiem|łapię|kumam|jest jasne|zrozumiałem|zrozumiałam); co (to znaczy|masz na myśli|to ma znaczyć)
(możesz|czy możesz|mógłbyś) (wyjaśnić|wytłumaczyć|sprecyzować|doprecyzować); niejasne; to znaczy
anlamadım; anlayamadım; anlamıyorum; (ne demek|nasıl yani|bu ne) (istiyorsun|bu|demek|şimdi); ne demek
nasıl yani; (açıklar|açıklayabilir|anlatır|netleştirir) (mısın|misin|mısınız|misiniz); kafam karıştı
(я |)не (понял|поняла|понимаю|понятно|ясно|совсем понял); непонятно
что (ты имеешь|вы имеете|это|значит|это значит) (в виду|значит); в смысле
(можешь|можете|поясни|поясните|объясни|объясните) (подробнее|пояснить|объяснить|уточнить|ещё раз|еще раз)
как это понимать
""",
    "Z": """
das (ist|wäre|war) alles; das (war|wär) 's; (auf wiedersehen|tschüss|tschüß|ciao); schönen tag (noch|)
c'est tout( merci|); au revoir; bonne journée; (eso|esto) es todo; adiós; hasta luego; que tengas buen día
(é|era) (só|tudo) isso; é tudo; tchau; è tutto; arrivederci; buona giornata; dat (is|was) alles; tot ziens
fijne dag; to wszystko; do widzenia; miłego dnia; bu kadar; hepsi bu; hoşça kal; iyi günler; это (всё|все)
до свидания; хорошего дня
""",
}
"""Kind of `feedback_patterns.KINDS` to phrases of languages that put blanks between words."""

SPACELESS: dict[str, str] = {
    "0": "没问题 不客气 没关系 不用了 不用谢 大丈夫です 問題ありません 結構です",
    "T": "谢谢 多谢 感谢 謝謝 感謝 ありがとう 有難う サンキュー 助かりました 助かる 恩に着ます",
    "P": "太好了 很好 完美 棒 厉害 不错 優秀 优秀 赞 满意 清楚了 明白了 懂了 有用 有帮助 很有帮助 没错 對了 对的 正确 正是 "
    "好的谢谢 牛 素晴らしい すごい 完璧 最高 いいね いいですね 良い 良かった よかった 正解 その通り わかりやすい 分かりやすい "
    "役に立 便利 なるほど 完ぺき バッチリ ばっちり",
    "S": "解决了 解決了 可以了 好用 搞定 能用了 成功了 正是我要的 就是这个 可以用了 弄好了 修好了 うまくいきました できました "
    "動きました 解決しました 直りました まさにこれ 探していたもの うまくいった 動いた 解決した",
    "N": "不对 不對 错了 錯了 错误 不正确 不好 没用 沒用 垃圾 糟糕 胡说 瞎说 差劲 太差 不行 不满意 失望 烂 不准确 没有帮助 没帮助 "
    "不是很好 不太好 不太对 違います 違う ちがう 間違 ダメ だめ 駄目 ひどい 最悪 使えない 役に立たない 役に立ちません 役立たず よくない "
    "良くない 嘘 不正確 残念 正しくない 正しくありません",
    "F": "不能用 打不开 打不開 报错 崩溃 还是不行 还是一样 没反应 失败 死机 卡住 闪退 用不了 无法 没有用 没成功 不起作用 坏了 "
    "動かない 動きません エラー 落ちました 開かない 開けません 失敗 クラッシュ 直っていない 直りません まだ同じ 表示されない 固まる 固まりました "
    "うまくいきません うまくいかない できません 壊れ",
    "X": "我的意思是 我是说 我说的是 我要的是 我问的是 不是这个 不是这样 我想要的是 不是我要的 而不是 其实 应该是 重新 再试 "
    "そうじゃなく そうではなく ではなくて じゃなくて という意味 と言った 言いたかった 聞きたかった いや、 いえ、 別の やり直 欲しかった ほしかった",
    "Q": "什么意思 不懂 不明白 没明白 没听懂 看不懂 不理解 不太明白 不清楚 解释一下 再说一遍 疑惑 どういう意味 どういうこと わかりません "
    "分かりません わからない 分からない 理解できません 理解できない もう一度説明 意味不明 説明してください よくわかり",
    "Z": "就这样 没有了 没别的了 再见 拜拜 以上です それだけです 大丈夫、ありがとう さようなら",
}
"""Kind to phrases, separated by blanks, of languages that put none between words: Chinese and Japanese.
Where two match at one place the longer wins, so that "役に立たない" is not read as "役に立"."""
