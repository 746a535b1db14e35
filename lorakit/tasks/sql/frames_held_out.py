"""Ways of asking that training never uses: those of `validation`, and those of the split `ways`. Data only.

No two of the three share a skeleton: the sentence in small letters without its slots' names, punctuation and articles.
"""

VALIDATION = """
[where_text]
Could I have {column} for whichever {table} sit under {text} {value}?
If {text} = {value} then {column}
Tell me about {column}; I care only for {value} in the {text} field.
Out of the {table}, those marked {value} for {text} have which {column}?
Take rows whose {text} happens to be {value}, then read off {column}.
Need {column}. {text} should be {value}.
Search {table}, {text} must be {value}, hand back {column}.
We are after the {column}; the {text} has to equal {value}.

[where_number]
Could I have {column} for whichever {table} sit {than} {bound} in {number}?
Given {number} {sign} {bound} I get which {column}
Tell me about {column}; I care only for {number} {than} {bound}.
Out of the {table}, those {than} {bound} by {number} have which {column}?
>|Take rows whose {number} goes past {bound}, then read off {column}.
<|Take rows whose {number} remains beneath {bound}, then read off {column}.
Need {column}. {number} should be {than} {bound}.
Search {table}, {number} must be {than} {bound}, hand back {column}.

[count]
What does {table} add up to in rows?
Quantity of {table} on record
Run a tally on {table}.
I wonder how many {table} we hold.
{table}, give quantity
Row total for {table}, if you would
Tot up the rows of {table}.
Exactly how many {table} can you find?

[count_where]
What does {text} {value} add up to in rows of {table}?
Quantity of {table} on record as {value} in {text}
Run a tally on {table} marked {value} for {text}.
I wonder how many {table} we hold with {value} under {text}.
{text} {value}, give quantity
Row total if {text} must be {value}
Tot up the rows whose {text} happens to be {value}.
Exactly how many {table} can you find when {text} is {value}?

[aggregate]
I wonder what the {stat} {number} might be.
{table}: one value, namely {stat} {number}
Run the {stat} over {number} in {table}.
Concerning {table}: their {stat} {number}?
Kindly state the {stat} {number} for {table}.
SUM|Tot up {number} for the whole of {table}.
AVG|What {number} would you expect of {table} on average?
MAX|Nothing in {table} beats which {number}?

[group]
I wonder what the {stat} {number} might be inside every {text}.
{text} after {text}, namely {stat} {number}
Run the {stat} over {number}, once under every {text}.
Concerning each {text} of {table}: its {stat} {number}?
Kindly state the {stat} {number} that belongs to any one {text}.
Make a table of {text} against {stat} {number}.
SUM|Tot up {number} under each {text}.
AVG|What {number} would you expect on average, given each {text}?

[top]
Could I have {column} for whichever {limit} {table} lead by {number}?
Down from most {number}, {limit} times {column}
Tell me about {column}; I care only for the {limit} peaks of {number}.
Out of the {table}, the {limit} strongest in {number} have which {column}?
Take {limit} rows where {number} peaks, then read off {column}.
Need {column}. {limit} rows, {number} as high as can be.
Search {table} for the {limit} giants in {number}, hand back {column}.
Line {table} up by {number}, biggest in front; what are the first {limit} {column}?

[distinct]
I wonder which {text} turn up at all.
Variety of {text} within {table}
Which {text} would I come across in {table}?
Boil {text} down to its separate values.
Kindly state every {text} a single time.
Name the assortment of {text} that {table} offer.
Need each {text} once. No copies.
Leave out repeated {text} and read off the rest.
"""

WAYS = """
[where_text]
{value} is what I typed for {text}; now fetch the matching {column}.
Suppose {text} were {value}: {column}, then?
My boss wants {column} on everything filed as {value} ({text}).
Any {table} tagged {text} {value}? Their {column}, quickly.
{column} under the assumption {text} {value}
{column} as filed in {table} beside {text} {value}
Do we know the {column} in cases of {text} {value}?
Ignore all {table} but {text} {value}, and spell out {column}.

[where_number]
{number} {than} {bound} is what I typed; now fetch the matching {column}.
Suppose {number} were {than} {bound}: {column}, then?
My boss wants {column} on everything {than} {bound} ({number}).
Any {table} {than} {bound} for {number}? Their {column}, quickly.
{column} under the assumption {number} {sign} {bound}
Do we know the {column} in cases of {number} {than} {bound}?
>|Ignore all {table} up to {bound} in {number}, and spell out {column}.
<|Ignore all {table} from {bound} upwards in {number}, and spell out {column}.

[count]
My boss wants a figure: {table}, how numerous?
no. of {table}
{table} measured in rows
Do we know how big {table} has become?
If I printed {table}, how many lines would that be?
Enumerate {table} and say the last number.
Tally of {table}, quickly
So how many {table}, all told?

[count_where]
My boss wants a figure: {table} filed as {value} ({text}), how numerous?
no. of {table}, {text} {value}
{text} {value} measured in rows
Do we know how big the share of {text} {value} has become in rows?
If I printed {table} with {text} {value}, how many lines would that be?
Ignore all {table} but {text} {value}; what number remains?
Tally of {text} {value}, quickly
So how many {table}, all told, say {value} at {text}?

[aggregate]
My boss wants one figure: {stat} {number}.
{table} taken as a whole, {stat} {number}
Do we know the {stat} {number} by now?
Boiling {table} down to one value, the {stat} {number} is what?
Think of {number} in {table}; its {stat}, quickly?
SUM|If all {table} pooled their {number}, how much would that make?
MAX|The record {number}, whichever of the {table} holds it
MIN|No {table} have less {number} than what?

[group]
My boss wants one figure for each {text}: {stat} {number}.
{text} taken one at a time, {stat} {number}
Do we know the {stat} {number}, one {text} after another?
Boiling each {text} down to one value, the {stat} {number} is what?
Think of {number}; its {stat}, {text} for {text}?
Pivot {table} on {text} with {stat} {number}.
SUM|If every {text} pooled its {number}, how much would that make for each?
MAX|The record {number} that any {text} holds, all {text} listed

[top]
My boss wants {column} on the {limit} champions in {number}.
Suppose only {limit} {table} may stay, the richest in {number}: {column}, then?
{column} given best {limit} at {number}
Any {table} could win on {number}; spell out the {column} of {limit} winners.
Do we know the {column} of the {limit} record holders for {number}?
Ignore all {table} but the {limit} highest by {number}, and spell out {column}.
Podium of {limit} for {number}, {column} only, quickly
From the summit of {number} downwards, {limit} steps: which {column}?

[distinct]
My boss wants to know what sorts of {text} there are.
{text} minus doubles
Do we know which {text} {table} fall into?
Suppose I ticked off {text} one after another: which would I have?
Fold identical {text} of {table} together and print.
Ever seen {text} in {table}? Enumerate them.
A menu of {text} to choose from in {table}
Strike out doubles in {text}; what remains?
"""
