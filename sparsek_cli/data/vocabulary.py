"""Words that hidden facts are made of: names of people and places, things, and plain nouns.

Lists are long so that nobody can answer by guessing: a value drawn from `NOUNS` is right by chance
about once in 350 times. All are ordinary English; none is taken from a data set.
"""


def _words(block: str) -> tuple[str, ...]:
    return tuple(block.split())


FIRST_NAMES = _words(
    """
    Agnes Albert Alice Ambrose Amelia Andrew Anthony Arthur Barbara Basil Beatrice Benjamin
    Bertha Caleb Caroline Catherine Cecil Charles Charlotte Christopher Clara Clement Daniel
    David Dinah Dorothy Edgar Edith Edmund Edward Eleanor Eliza Ellen Emily Ernest Esther Eugene
    Eva Fanny Felix Flora Frances Francis Frederick George Gertrude Gilbert Grace Gregory Hannah
    Harriet Harold Helen Henry Herbert Hester Hilda Horace Hubert Hugh Humphrey Ida Isaac Isabel
    Jacob James Jane Jasper Jerome Joan John Joseph Judith Julia Julian Katharine Laura Laurence
    Leonard Lewis Lionel Louisa Lucy Luke Lydia Mabel Magdalen Margaret Marian Mark Martha
    Martin Mary Matilda Matthew Maurice Maxwell Miles Millicent Miriam Nathan Nicholas Nora
    Oliver Oscar Owen Patience Patrick Paul Percy Peter Philip Phoebe Priscilla Quentin Rachel
    Ralph Rebecca Reginald Richard Robert Roger Roland Rosamund Rupert Ruth Samuel Sarah
    Sebastian Sibyl Silas Simon Stella Stephen Susan Sylvia Theodore Theresa Thomas Timothy
    Tobias Ursula Valentine Victor Vincent Violet Walter Wilfred William Winifred Zachary
    """
)

LAST_NAMES = _words(
    """
    Abbott Adams Aldridge Allen Archer Arnold Ashby Bailey Baker Ballard Barlow Barnes Barrett
    Bates Becker Bellamy Bennett Blackwood Blake Bolton Bradley Bramwell Briggs Brooks Bryant
    Burton Butler Caldwell Carlisle Carter Chandler Chapman Clarke Clayton Coleman Collins
    Cooper Crawford Crosby Dalton Davenport Dawson Denham Dixon Drake Draper Dudley Dunbar Eaton
    Elliott Ellis Emerson Fairfax Farrell Fielding Finch Fisher Fleming Fletcher Forbes Foster
    Franklin Fraser Gardner Garland Gibson Goddard Gordon Graham Granger Gray Griffin Hale
    Hamilton Hammond Hardwick Harper Harris Hartley Hawkins Hayward Henderson Hobson Holland
    Holmes Hopkins Howard Hudson Hunter Ingram Irving Jackson Jarvis Jenkins Johnson Keller
    Kendall Kingsley Knight Lambert Lancaster Langley Lawson Leigh Lockwood Lowell Malcolm
    Manning Marlowe Marsh Marshall Mason Maynard Mercer Merton Middleton Mitchell Moore Morgan
    Morris Morton Murray Nash Nelson Newton Norris Northcote Norton Oakley Osborne Owens Page
    Palmer Parker Payne Pearson Pembroke Perkins Phillips Porter Potter Preston Quincy Ramsay
    Randall Raymond Redfern Reynolds Richards Roberts Robinson Rogers Russell Rutherford Sanders
    Saunders Sawyer Selby Sharpe Shaw Shepherd Simpson Sinclair Skinner Spencer Stafford Stanley
    Steele Stewart Stone Sullivan Sutton Talbot Taylor Temple Thornton Tilney Townsend Travers
    Tucker Turner Underwood Vaughan Vernon Wade Walker Wallace Walsh Warren Watson Webster Wells
    Weston Wheeler Whitaker Wilkins Willis Winslow Wood Woodward Wright Wyatt Yates York
    """
)

PLACES = _words(
    """
    Abbotsford Aldermoor Alderton Ashcombe Ashdale Barrowfield Beechwood Birchover Blackmere
    Blythburn Bramblewick Branksea Briarley Brookhaven Burnside Castlemoor Cedarholm Chalkhill
    Cliffbury Coldharbour Copperhill Cranford Crossmere Crowhurst Dalebridge Deepwater Dovecote
    Drumlin Duncaster Eastmarsh Eldergate Elmstead Fairbrook Fallowfield Farthing Fernhill
    Foxcote Glenmore Goldcliff Grangemouth Greenhithe Greystoke Hallowdale Harrowgate Hartwell
    Hawksmoor Hazelmere Heathrow Highcombe Holmwood Ironbridge Ivychurch Kestrelby Kilmarsh
    Kingsbarrow Lambourne Larkfield Lindenau Longacre Lowmoor Marchmont Marlbury Meadowsweet
    Merrowdown Millbrook Moorgate Netherby Newhaven Northwick Oakhampton Oldcastle Orchardleigh
    Otterburn Pebblecombe Pinewood Quarrington Ravensworth Redcliff Ridgeway Riverton Rosehill
    Rushmere Sandbourne Seaford Shadwell Silverdale Southwold Stonebridge Summerfield
    Swallowfield Tanglewood Thornbury Tidewater Underhill Wakefield Waterford Westbrook
    Whitcombe Willowby Winterbourne Wolverdale Woodstock Wyndham Yarrowby
    """
)

MATERIALS = _words(
    """
    ancient battered black blue brass broad bronze brown carved copper crimson crooked dusty
    empty enormous faded golden gray green heavy hollow iron leather little locked narrow oaken
    painted plain polished purple red round rusty scarlet silver square striped tall tin velvet
    white wooden yellow
    """
)

CONTAINERS = _words(
    """
    bag barrel basket bottle bowl box bucket bureau cabinet cage case casket chest cradle crate
    cupboard desk drawer hamper jar jug kettle locker pitcher pot pouch purse sack safe satchel
    trough trunk tub urn vase wagon wallet wardrobe
    """
)

NOUNS = _words(
    """
    acorn almond amber anchor angel antler anvil apple apricot apron arch arrow ash axe bacon
    badge badger banjo banner barley beacon bean bear beaver bee beetle bell bench berry bird
    biscuit blanket blossom boot bottle boulder bramble branch brandy bread brick bridge brush
    buckle bullet butter butterfly button cabbage cactus cake camel canal candle cannon canoe
    canvas cape carpet carriage carrot castle cat cathedral cave cedar chain chair chalk chapel
    cheese cherry chestnut chicken chimney cider cigar cinnamon circle clay cliff cloak clock
    cloud clover coal cobweb coffee coffin coin comb comet compass copper coral cork corn
    cottage cotton cow crab cradle cream cricket crocus crow crown crutch crystal cup curtain
    cushion daffodil dagger daisy deer desert diamond dolphin donkey dove dragon drum duck dust
    eagle earring eel egg elbow elephant elm ember emerald engine falcon fan feather fence fern
    ferry fiddle fig finger fire fish flag flame flint flour flower flute forest fountain fox
    frog frost fruit furnace garden garlic garnet gate ghost giant ginger glacier glass globe
    glove goat gold goose grain granite grape grass grasshopper gravel guitar gull gun hammer
    handkerchief harbour hare harp hat hawk hay hazel heart heather hedge helmet hen heron
    herring hill hive holly honey honeysuckle hood hook horn horse hound house ice ink iris iron
    island ivory ivy jacket jar jasmine jelly jewel juniper kettle key king kite kitten knife
    knot lace ladder lake lamb lamp lantern lark laurel lavender lead leaf leather lemon lens
    leopard letter lever lighthouse lightning lily lime linen lion lizard lobster locket log
    lute magnet magpie mahogany maple marble mask mast meadow melon mermaid milk mill mint
    mirror mistletoe mole monkey moon moss moth mountain mouse mule mushroom music mustard nail
    napkin necklace needle nest nettle nightingale nut oak oar oats ocean olive onion opal
    orange orchard orchid organ otter oven owl ox oyster palace palm pansy paper parrot parsley
    pasture peach peacock pear pearl pebble pelican pencil pepper piano pigeon pine pipe plough
    plum pocket poem poison poker pond pony poplar poppy porridge potato powder primrose prism
    pudding pump pumpkin puppet pyramid queen quill rabbit raft rain rainbow raisin raven razor
    reed ribbon rice rifle ring river robin rocket root rope rose rosemary ruby rudder saddle
    saffron sage sail salmon salt sand sandal sapphire satin sausage saw scarf sceptre scissors
    seal seed shadow shawl sheep shell shepherd shield ship shoe shovel shrimp sickle silk
    silver skull sleeve slipper smoke snail snake snow soap soldier soup spade sparrow spear
    spider spoon spring spruce squirrel stable staff star statue steam steel stocking stone
    stork storm stove straw stream sugar sulphur summer sun swallow swan sword syrup table
    tailor tea temple tent thimble thistle thorn thread thrush thunder tiger timber toad tobacco
    torch tortoise tower train treacle trumpet tulip tunnel turkey turnip turtle umbrella valley
    vase velvet vine vinegar violet violin volcano wagon walnut water wave wax weasel well whale
    wheat wheel whip whisky whistle willow wind window wine wing winter wolf wood wool wreath
    yacht yew zebra
    """
)
