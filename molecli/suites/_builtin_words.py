"""The vocabulary of the embedded text base: 88 concepts in four languages.

Each row is one concept: English, French, German, Spanish; for nouns and verbs the English plural follows the English
word. Translation is word by word, in lower case, without articles, gender or agreement. Each spelling belongs to one
concept in one language (tested), so that every operation on words has one right answer.
"""

from __future__ import annotations

NOUNS = """
fox foxes renard fuchs zorro
dog dogs chien hund perro
cat cats chat katze gato
bear bears ours bär oso
horse horses cheval pferd caballo
cow cows vache kuh vaca
bird birds oiseau vogel pájaro
duck ducks canard ente pato
goat goats chèvre ziege cabra
pig pigs cochon schwein cerdo
mouse mice souris maus ratón
frog frogs grenouille frosch rana
bee bees abeille biene abeja
king kings roi könig rey
queen queens reine königin reina
farmer farmers fermier bauer granjero
baker bakers boulanger bäcker panadero
sailor sailors marin matrose marinero
doctor doctors médecin arzt médico
teacher teachers professeur lehrer maestro
child children enfant kind niño
woman women femme frau mujer
man men homme mann hombre
boy boys garçon junge muchacho
girl girls fille mädchen chica
friend friends ami freund amigo
house houses maison haus casa
boat boats bateau boot barco
tree trees arbre baum árbol
river rivers fleuve fluss río
mountain mountains montagne berg montaña
garden gardens jardin garten jardín
book books livre buch libro
clock clocks horloge uhr reloj
window windows fenêtre fenster ventana
bridge bridges pont brücke puente
"""

VERBS = """
runs run court rennt corre
sleeps sleep dort schläft duerme
sings sing chante singt canta
eats eat mange isst come
drinks drink boit trinkt bebe
sees see voit sieht ve
finds find trouve findet encuentra
loves love aime liebt ama
helps help aide hilft ayuda
jumps jump saute springt salta
swims swim nage schwimmt nada
flies fly vole fliegt vuela
reads read lit liest lee
writes write écrit schreibt escribe
waits wait attend wartet espera
laughs laugh rit lacht ríe
works work travaille arbeitet trabaja
dances dance danse tanzt baila
follows follow suit folgt sigue
calls call appelle ruft llama
"""

# Consecutive rows are opposites of each other.
ADJECTIVES = """
big grand groß grande
small petit klein pequeño
old vieux alt viejo
young jeune jung joven
hot chaud heiß caliente
cold froid kalt frío
fast rapide schnell rápido
slow lent langsam lento
happy heureux glücklich feliz
sad triste traurig infeliz
strong fort stark fuerte
weak faible schwach débil
rich riche reich rico
poor pauvre arm pobre
black noir schwarz negro
white blanc weiß blanco
wet mouillé nass mojado
dry sec trocken seco
clean propre sauber limpio
dirty sale schmutzig sucio
heavy lourd schwer pesado
light léger leicht ligero
loud bruyant laut ruidoso
quiet calme leise callado
full plein voll lleno
empty vide leer vacío
good bon gut bueno
bad mauvais schlecht malo
hard dur hart duro
soft doux weich blando
thick épais dick grueso
thin mince dünn delgado
"""


def rows(table: str) -> list[list[str]]:
    """The words of a table above, row by row."""
    return [line.split() for line in table.strip().splitlines()]
